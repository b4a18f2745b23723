"""Prints the JSON Schema of a run's or a sweep's config: `python -m warm_dist.config [sweep] > configs/….json`."""

from __future__ import annotations

import argparse
import json

from warm_dist.config.run import Config
from warm_dist.config.sweep import SweepConfig
from warm_dist.errors import run

parser = argparse.ArgumentParser(prog="python -m warm_dist.config", description=__doc__)
parser.add_argument("kind", nargs="?", choices=("run", "sweep"), default="run")
model = SweepConfig if parser.parse_args().kind == "sweep" else Config
run(lambda: print(json.dumps(model.model_json_schema(by_alias=True), indent=2)))
