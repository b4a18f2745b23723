"""The list of a sweep's trials: validated before anything starts, and the same on every resume."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from warm_dist.config.batch import check_world_size
from warm_dist.config.identity import INCIDENTAL, digest
from warm_dist.config.load import assign, flatten, known_keys
from warm_dist.config.run import Config, validate
from warm_dist.config.sweep import SEED, Axis, Origins, SweepConfig
from warm_dist.config.values import exact
from warm_dist.errors import ConfigError, WorldSizeError
from warm_dist.sweeps.ranking import headings

Values = dict[str, Any]
"""A trial's values by dotted key, in the sweep's order."""
_NOT_SEARCHED = {"output", "description", "$schema", "tracking", "checkpoint", "engine"}
_MEASURE = "eval", "data.manifest", "data.resolution", "data.channels"
_SECTIONS = {key.rpartition(".")[0] for key in known_keys(Config)} - {""}
_NAME_LENGTH = 80


@dataclass(frozen=True)
class Trial:
    """One training run. config: complete except for what `run_config` sets (output, checkpoint.url, tracking)."""

    name: str
    values: Values
    seed: int
    config: Config


def trials(sweep: SweepConfig, base: dict[str, Any], origins: Origins | None = None) -> list[Trial]:
    """All trials: every point of the space for every seed. base, origins: as `load_sweep` returns them.

    A trial's name has its values and a digest of everything that makes its network, so a resumed sweep recognises its
    trials, and more seeds, values or draws extend a sweep. Raises ConfigError naming the trial and key, WorldSizeError.
    """
    origins = origins or Origins()
    _check_keys(sweep, origins)
    out: dict[str, Trial] = {}
    for seed, values in itertools.product(sweep.seeds, points(sweep)):
        trial = _trial(sweep, base, values, seed, origins)
        if trial.name in out and all(axis.grid is not None for axis in sweep.space.values()):
            raise ConfigError(f"{origins.sweep}: space: the values {values} come twice")
        out[trial.name] = trial  # the same choice drawn twice is one trial
    return list(out.values())


def points(sweep: SweepConfig) -> list[Values]:
    """The points of the search space: every draw at every point of the grid.

    Draw i of a key does not depend on the grid point (comparisons are paired), on other keys, or on the number of draws.
    Source: derived.
    """
    from warm_dist.rng import generator

    grids = {key: axis.grid for key, axis in sweep.space.items() if axis.grid is not None}
    drawn = {key: axis for key, axis in sweep.space.items() if axis.grid is None}
    out = []
    for i in range(sweep.num_samples if drawn else 1):
        uniforms = {key: float(generator(sweep.search_seed, f"sweep/{key}", i).random()) for key in drawn}
        draws = {key: _draw(axis, uniforms[key]) for key, axis in drawn.items()}
        for combination in itertools.product(*grids.values()):
            values = draws | dict(zip(grids, combination, strict=True))
            out.append({key: values[key] for key in sweep.space})
    return out


def _draw(axis: Axis, uniform: float) -> Any:
    """Map a uniform in [0, 1) to a value; numbers get five significant digits, so that names show them exactly."""
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


def _check_keys(sweep: SweepConfig, origins: Origins) -> None:
    for part, key in [("space", key) for key in sweep.space] + [("set", key) for key in sweep.set]:
        if key in _SECTIONS and not (key == "eval" and sweep.set.get(key, key) is None):
            example = next(
                known for known in known_keys(Config) if known.startswith(f"{key}.") and known not in _SECTIONS
            )
            raise ConfigError(
                f"{origins.sweep}: {part}: {key!r} is a section: name one of its keys, such as {example!r}"
            )
    space = f"{origins.sweep}: space"
    for key in sweep.space:
        if key == SEED:
            raise ConfigError(f"{space}: {SEED} is set by the sweep's list seeds")
        if key.split(".")[0] in _NOT_SEARCHED:
            raise ConfigError(f"{space}: {key!r} cannot be searched; the sweep sets it, or the network is the same")
        if key in INCIDENTAL:
            raise ConfigError(f"{space}: {key!r} cannot be searched: the network does not depend on it")
        inner = [other for other in sweep.space if other.startswith(f"{key}.")]
        if inner:
            raise ConfigError(
                f"{space}: {inner[0]!r} is inside {key!r}; search one of them, or whole values of {key!r}"
            )
        if key.startswith(_MEASURE):
            raise ConfigError(f"{space}: {key!r} makes Fréchet distances that cannot be compared; move it to set")


def _trial(sweep: SweepConfig, base: dict[str, Any], values: Values, seed: int, origins: Origins) -> Trial:
    tree = json.loads(json.dumps(base))
    where = f"trial {label_of(values)}" if values else origins.base
    for key, value in {**values, SEED: seed}.items():
        assign(tree, key, copy.deepcopy(value), where if key in values else origins.base)
    tree |= {"output": "trial"}
    config = validate(tree, origins.base, {**dict.fromkeys(values, where), **origins.keys})
    if config.eval is None:
        raise ConfigError(
            f"{origins.keys.get('eval', origins.base)}: a sweep ranks by the Fréchet distance, so it needs the section eval"
        )
    least, total = config.eval.eval_nimg, config.train.total_nimg
    if sweep.scheduler is not None and not least <= sweep.scheduler.grace_nimg < total:
        raise ConfigError(
            f"{where}: scheduler.grace_nimg {sweep.scheduler.grace_nimg} must be at least eval.eval_nimg {least} and "
            f"below train.total_nimg {total}"
        )
    try:
        check_world_size(config, sweep.trial.processes)
    except WorldSizeError as error:
        factors = ("trial.nodes x " if sweep.trial.nodes > 1 else "") + "trial.processes_per_node"
        raise WorldSizeError(f"{origins.sweep}: {factors}: {error}") from None
    label = label_of({**values, SEED: seed})[:_NAME_LENGTH].rstrip(",")
    return Trial(f"{label}-{digest(config)}", values, seed, config)


def label_of(values: Values) -> str:
    """A label such as `bnr=0.5,lr=0.001`, safe in folder names and URLs; keys are whole if two share their last part."""
    names = headings(list(values))
    parts = [f"{name}={_text(value)}" for name, value in zip(names, values.values(), strict=True)]
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts), flags=re.ASCII)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict):
            return "_".join(str(part) for part in flatten(value).values())
        return value if isinstance(value, str) else json.dumps(value)
    return exact(value)


def constant_bnr(config: Config) -> float | None:
    """The BNR of training if it is one finite number, else None (a path, random or cold)."""
    bnr = config.process.bnr
    return float(bnr) if isinstance(bnr, int | float) and math.isfinite(bnr) else None
