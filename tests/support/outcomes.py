"""Made-up outcomes of a sweep's trials."""

from __future__ import annotations

from typing import Any

from warm_dist.sweeps.ranking import Outcome

POWER = {"kind": "power", "bnr": 0.5, "exponent": 0.2}
TOTAL = 100


def evaluation(nimg: int, frechet: float | None, **more: Any) -> dict[str, Any]:
    record = {"time": 1700000000.125 + nimg, "attempt": 1, "nimg": nimg, "kind": "eval", "frechet": frechet}
    record |= {"spread": None, "blocks": 1, "floor": 6.5, "floor_n": 1230, "num_images": 2048, "nfe": 35, "bnr": "0.5"}
    record |= {"method": "heun", "name": "FID", "spec": "s1", "measure": "m1", "seconds": 12.5, "grid": "samples/1.png"}
    return record | more


def outcome(
    name: str, *points: tuple[int, float | None], state: str = "finished", seed: int = 0, **more: Any
) -> Outcome:
    """points: (nimg, Fréchet distance)."""
    bnr = more.pop("bnr", 0.5)
    values = more.pop("values", {"process.bnr": bnr, "train.seed": seed})
    records = [evaluation(nimg, value, **more) for nimg, value in points]
    reason = "NumericsError: not finite\ntraceback" if state == "failed" else ""
    return Outcome(name, values, seed, bnr if isinstance(bnr, float) else None, TOTAL, state, reason, records)
