"""From image files to training batches: packing, indexing, and a reader that can start anywhere."""
