"""The order of the data and the reader that turns a manifest into batches."""
