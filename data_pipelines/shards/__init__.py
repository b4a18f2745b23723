"""WebDataset shards and their manifest: encoding, indexing, statistics."""
