"""The training loop and its parts: inputs, engines, EMA, step metrics, one attempt at a run."""
