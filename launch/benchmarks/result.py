"""Spreads of repeated measurements, verdicts against targets, and one way to print them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
JOB_S = 300  # the longest that one contender may take


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over rounds."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def columns(self, digits: int) -> str:
        """Two columns of a table."""
        return f"{self.median:12.{digits}f}{f'{self.min:.{digits}f}..{self.max:.{digits}f}':>18}"


def verdict(values: list[float], target: float, below: bool) -> dict[str, Any]:
    """Spread, target, and whether the median reaches it."""
    spread = Spread.of(values)
    met = spread.median <= target if below else spread.median >= target
    return asdict(spread) | {"target": target, "met": met}
