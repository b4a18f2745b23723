"""From images anywhere to training batches: packing, indexing, storage, and the reader that seeks."""
