"""Sources of images for packing."""
