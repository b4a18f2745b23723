"""The sharded checkpoint format, where checkpoints live, uploads, and exported weights."""
