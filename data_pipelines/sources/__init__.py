"""Where images come from before packing."""
