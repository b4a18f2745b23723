"""Sweeps on Ray Tune: trials, their processes, ranking, pictures."""
