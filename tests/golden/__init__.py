"""Golden values: what the product computes, writes and prints, to the last bit. See README.md."""
