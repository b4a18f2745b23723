"""All that golden values know of the product beside its public commands: what may move when its code moves."""

from __future__ import annotations

SCHEMAS = {"schema": ("warm_dist.config",), "sweep_schema": ("warm_dist.config", "sweep")}
"""The module, and its arguments, that print each of configs/*schema.json."""
