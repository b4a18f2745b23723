"""From a manifest to training batches: the order of the data, and the reader."""
