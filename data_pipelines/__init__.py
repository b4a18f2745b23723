"""From image files to training batches: packing, indexing, and a reader that can start anywhere."""

import warm_dist  # noqa: F401  # so that Ctrl-C ends a command from here on
