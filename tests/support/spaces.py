"""A sweep over a made-up space, on the quickstart's config."""

from __future__ import annotations

import json

from tests.support.paths import ROOT
from warm_dist.config.sweep import SweepConfig

BASE = json.loads((ROOT / "configs" / "quickstart.json").read_text())


def sweep(space, **more) -> SweepConfig:
    tree = {"base": "quickstart.json", "output": "out", "space": space, **more}
    return SweepConfig.model_validate_json(json.dumps(tree))
