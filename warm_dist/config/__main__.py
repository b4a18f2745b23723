"""The JSON Schema that editors read through the `$schema` key: `python -m warm_dist.config [sweep] > configs/[sweep_]schema.json`."""

from __future__ import annotations

import json
import sys

from warm_dist.config.run import Config
from warm_dist.config.sweep import SweepConfig

if __name__ == "__main__":
    model = SweepConfig if sys.argv[1:] == ["sweep"] else Config
    print(json.dumps(model.model_json_schema(by_alias=True), indent=2))
