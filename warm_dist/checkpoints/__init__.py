"""The sharded checkpoint format, where checkpoints are stored, uploads, and exported weights."""
