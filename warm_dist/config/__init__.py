"""What describes a run or a sweep: strict models, loading, overrides, batch arithmetic."""
