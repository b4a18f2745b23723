"""A run's folder: its files, who holds it, how it ended, and metrics.jsonl."""
