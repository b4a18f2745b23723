"""Made-up cells of an NFE x BNR surface."""

from __future__ import annotations

from typing import Any


def line(bnr: str, nfe: int, frechet: float | None, weights: str = "a", **more: Any) -> dict[str, Any]:
    found = {"weights": weights, "bnr": bnr, "nfe": nfe, "frechet": frechet, "spread": 0.5, "floor": 10.0}
    found |= {"method": "heun", "measure": "m", "name": "Fréchet distance (lite0)", "recipe": weights, "spec": bnr}
    return found | {"seed": 0} | more


GRID = [line(bnr, nfe, 20.0 + nfe + 3 * k) for k, bnr in enumerate(("10", "0", "0.5")) for nfe in (35, 9)]
