"""MLflow as a mirror of metrics.jsonl, the logged model, Prometheus, and machine load."""
