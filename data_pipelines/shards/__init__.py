"""WebDataset shards and their manifest."""
