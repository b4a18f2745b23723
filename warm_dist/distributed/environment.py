"""The numbers that a launcher sets in the environment: ranks, processes, a port. Without torch."""

from __future__ import annotations

import os

from warm_dist.errors import ConfigError


def from_environment(name: str, default: int) -> int:
    """A number that a launcher sets; unset or empty: the default. Raises ConfigError for anything else."""
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r}: needs a number; the launcher sets it")
    return int(text)
