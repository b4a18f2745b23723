"""The trials of a sweep: a pure list, made and validated whole before anything starts, and the same on every resume."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from warm_dist.config.identity import INCIDENTAL, digest
from warm_dist.config.load import assign, flatten, known_keys
from warm_dist.config.run import Config, validate
from warm_dist.config.sweep import SEED, Axis, SweepConfig
from warm_dist.config.values import exact
from warm_dist.errors import ConfigError

Values = dict[str, Any]
"""The searched keys, by dotted path, in the sweep's order, with a trial's values."""
_OWN = {"output", "description", "$schema", "tracking", "checkpoint", "engine"}
_MEASURE = "eval", "data.manifest", "data.resolution", "data.channels"
_SECTIONS = {key.rpartition(".")[0] for key in known_keys(Config)} - {""}
_NAME_LENGTH = 80


@dataclass(frozen=True)
class Trial:
    """One training run. config: complete but for what depends on the sweep's place (output, checkpoint.url, tracking)."""

    name: str
    values: Values
    seed: int
    config: Config


def trials(sweep: SweepConfig, base: dict[str, Any]) -> list[Trial]:
    """All trials, each valid: for every seed, for every draw, the grid.

    A trial's name has its values, and a digest of all that makes its network; so a resumed sweep knows its own trials,
    and a longer list of seeds, values or draws adds to a sweep. Raises ConfigError that names the trial and the key,
    WorldSizeError.
    """
    _check_keys(sweep)
    out: dict[str, Trial] = {}
    for seed, values in itertools.product(sweep.seeds, points(sweep)):
        trial = _trial(sweep, base, values, seed)
        if trial.name in out and all(axis.grid is not None for axis in sweep.space.values()):
            raise ConfigError(f"space: the values {values} come twice")
        out[trial.name] = trial  # a choice may be drawn twice: it is one trial
    return list(out.values())


def points(sweep: SweepConfig) -> list[Values]:
    """The points of the space: every draw at every point of the grid.

    Draw i of a key is the same at each of them (comparisons are paired), whatever other keys are drawn, and however
    many draws there are. Source: derived.
    """
    from warm_dist.rng import generator

    grids = {key: axis.grid for key, axis in sweep.space.items() if axis.grid is not None}
    drawn = {key: axis for key, axis in sweep.space.items() if axis.grid is None}
    out = []
    for i in range(sweep.num_samples if drawn else 1):
        draws = {
            key: _draw(axis, float(generator(sweep.search_seed, f"sweep/{key}", i).random()))
            for key, axis in drawn.items()
        }
        for combination in itertools.product(*grids.values()):
            values = draws | dict(zip(grids, combination, strict=True))
            out.append({key: values[key] for key in sweep.space})
    return out


def _draw(axis: Axis, uniform: float) -> Any:
    """A uniform in [0, 1) → a value. Numbers have four digits after the first, so that a name says all of them."""
    if axis.choice is not None:
        return axis.choice[int(uniform * len(axis.choice))]
    if axis.uniform is not None:
        low, high = axis.uniform
        value = low + (high - low) * uniform
    else:
        assert axis.log_uniform is not None
        low, high = axis.log_uniform
        value = low * (high / low) ** uniform
    return min(max(float(f"{value:.4e}"), low), high)


def _check_keys(sweep: SweepConfig) -> None:
    for key in (*sweep.space, *sweep.set):
        if key in _SECTIONS:
            raise ConfigError(f"{key!r} is a section: name a key of it, as in {_example(key)!r}")
    for key in sweep.space:
        if key == SEED:
            raise ConfigError(f"space: {SEED} is the list seeds of the sweep")
        if key.split(".")[0] in _OWN:
            raise ConfigError(
                f"space: {key!r} cannot be searched; the sweep sets it itself, or it makes no other network"
            )
        if key in INCIDENTAL:
            raise ConfigError(f"space: {key!r} cannot be searched: nothing of the network changes with it")
        inner = [other for other in sweep.space if other.startswith(f"{key}.")]
        if inner:
            raise ConfigError(
                f"space: {inner[0]!r} is inside {key!r}; search one of them, or give {key!r} whole values"
            )
        if key.startswith(_MEASURE):
            raise ConfigError(f"space: {key!r} would make Fréchet distances that cannot be compared; it belongs in set")


def _example(section: str) -> str:
    return next(key for key in known_keys(Config) if key.startswith(f"{section}.") and key not in _SECTIONS)


def _trial(sweep: SweepConfig, base: dict[str, Any], values: Values, seed: int) -> Trial:
    from warm_dist.config.batch import check_world_size

    tree = json.loads(json.dumps(base))
    where = f"trial {short(values)}" if values else "the base config"
    for key, value in {**values, SEED: seed}.items():
        assign(tree, key, copy.deepcopy(value), where)
    tree |= {"output": "trial"}
    config = validate(tree, where)
    if config.eval is None:
        raise ConfigError(f"{where}: a sweep ranks by the Fréchet distance, so it needs the section eval")
    if (
        sweep.scheduler is not None
        and not config.eval.eval_nimg <= sweep.scheduler.grace_nimg < config.train.total_nimg
    ):
        raise ConfigError(
            f"{where}: scheduler.grace_nimg {sweep.scheduler.grace_nimg} must be at least eval.eval_nimg "
            f"{config.eval.eval_nimg} and below train.total_nimg {config.train.total_nimg}"
        )
    check_world_size(config, sweep.trial.processes)
    label = short({**values, SEED: seed})[:_NAME_LENGTH].rstrip(",")
    return Trial(f"{label}-{digest(config)}", values, seed, config)


def short(values: Values) -> str:
    """`bnr=0.5,lr=0.001`: the last parts of the keys (more where two are alike), fit for a folder's name and an URL."""
    names = [key.rpartition(".")[2] for key in values]
    parts = [
        f"{name if names.count(name) == 1 else key}={_text(value)}"
        for (key, value), name in zip(values.items(), names, strict=True)
    ]
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts), flags=re.ASCII)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict):
            return "_".join(str(part) for part in flatten(value).values())
        return value if isinstance(value, str) else json.dumps(value)
    return exact(value)


def constant_bnr(config: Config) -> float | None:
    """The BNR of training where it is one number, infinite (cold) not counted."""
    bnr = config.process.bnr
    return float(bnr) if isinstance(bnr, int | float) and math.isfinite(bnr) else None
