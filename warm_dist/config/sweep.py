"""A sweep's config: a run's config, the keys to search, how trials are scheduled, and what each may use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, JsonValue

from warm_dist.config.load import assign, dump, flatten, parse_setting, read_tree, validate_as
from warm_dist.config.urls import URL, LocalPath, Place, Server
from warm_dist.config.values import Count, Finite, Name, NonNegative, Positive, Section
from warm_dist.errors import ConfigError

AboveOne = Annotated[float, Field(ge=1.1, allow_inf_nan=False)]  # closer to 1 gives thousands of rungs
Key = Annotated[str, Field(pattern=r"^[a-z]\w*(\.[a-z]\w*)*$")]
SEED = "train.seed"
OWN = ("output", "checkpoint.url", "checkpoint.endpoint_url", *(
    f"tracking.{key}" for key in ("parent_run_id", "run_name", "log_model", "registered_model", "prometheus_port")
))  # fmt: skip
"""Keys of a trial's config that the sweep sets."""
MOST_TRIALS = 10_000


class Axis(Section):
    """How one key is searched: exactly one of the four. A grid runs in full; the others are drawn num_samples times."""

    grid: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = Field(None, description="each of these values")
    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = Field(None, description="one at random")
    uniform: tuple[Finite, Finite] | None = Field(None, description="[low, high]")
    log_uniform: tuple[Finite, Finite] | None = Field(None, description="[low, high], uniform in the logarithm")

    def model_post_init(self, context: Any) -> None:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"needs exactly one of grid, choice, uniform, log_uniform; has {sorted(given) or 'none'}")
        for low, high in [value for value in (self.uniform, self.log_uniform) if value is not None]:
            if low >= high:
                raise ValueError(f"the low end {low:g} must be below the high end {high:g}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform needs a low end above 0, got {self.log_uniform[0]:g}")


class AshaConfig(Section):
    """Asynchronous successive halving by the Fréchet distance over nimg. Source: Li et al. 2020, arXiv 1810.05934."""

    kind: Literal["asha"]
    grace_nimg: Positive = Field(description="first rung, images; the next are at grace_nimg * reduction_factor^k")
    reduction_factor: AboveOne = Field(3.0, description="the best 1/factor of the trials at a rung continue")


class TrialConfig(Section):
    """Resources of each trial, and how often it may fail."""

    nodes: Positive = Field(1, description="machines per trial, each with processes_per_node processes")
    processes_per_node: Positive = 1
    cpus_per_process: Positive = 1
    gpus_per_process: NonNegative = Field(0.0, description="0: on the CPU; a fraction shares a GPU among trials")
    max_failures: Count = Field(2, description="restarts of a failed trial, from its checkpoint")

    def model_post_init(self, context: Any) -> None:
        if self.gpus_per_process > 1 or (0 < self.gpus_per_process < 1 and self.processes > 1):
            raise ValueError("gpus_per_process must be 0 or 1, or a fraction for a trial of one process")

    @property
    def processes(self) -> int:
        """Number of processes of a trial, over all its machines."""
        return self.nodes * self.processes_per_node

    @property
    def bundle(self) -> dict[str, float]:
        """The resources that Ray reserves for a trial on each machine."""
        cpus = float(self.processes_per_node * self.cpus_per_process)
        gpus = self.processes_per_node * self.gpus_per_process
        return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


class SurfaceConfig(Section):
    """After the sweep, the best trial's network is evaluated at each NFE along each BNR."""

    nfe: Annotated[tuple[Positive, ...], Field(min_length=1)]
    bnr: tuple[NonNegative, ...] = Field((), description="empty: the path it was trained on")
    num_images: Annotated[int, Field(ge=2)] | None = Field(None, description="null: eval.num_images")
    num_blocks: Positive = Field(1, description="blocks of seeds per cell, for mean ± spread")

    def model_post_init(self, context: Any) -> None:
        for name, values in (("nfe", self.nfe), ("bnr", self.bnr)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a duplicate")


class SweepConfig(Section):
    """Everything that describes a sweep."""

    schema_url: URL | None = Field(None, alias="$schema")
    description: str = ""
    base: LocalPath = Field(description="a run's config to vary; path relative to this file")
    set: dict[Key, JsonValue] = Field(
        default_factory=dict, description="changes to base for all trials, by dotted path"
    )
    output: Place = Field(description="where trials and results go: a local or shared folder, or s3://bucket/prefix")
    endpoint_url: Server | None = Field(None, description="S3 endpoint of output; null: AWS")
    node_dir: LocalPath = Field(
        "~/.cache/warm-dist/sweeps",
        validate_default=True,
        description="local folder on each machine for caches, and for the trials' runs if output is s3://",
    )
    space: dict[Key, Axis] = Field(default_factory=dict, description="keys to search, by dotted path")
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = Field((0,), description="values of train.seed per point")
    num_samples: Positive = Field(1, description="random draws of the keys without a grid, at each point of the grid")
    search_seed: Count = Field(0, description="seed of those draws")
    scheduler: AshaConfig | None = Field(None, description="null: every trial trains to its end")
    trial: TrialConfig = TrialConfig()
    max_concurrent: Positive | None = Field(None, description="trials at a time; null: as many as the resources allow")
    ray_address: URL | None = Field(None, description="Ray cluster to join; null: RAY_ADDRESS, or else a local Ray")
    surface: SurfaceConfig | None = Field(None, description="null: no surface")
    registered_model: Name | None = Field(None, description="register the best trial's model in MLflow under this name")

    def model_post_init(self, context: Any) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a duplicate")
        drawn = [key for key, axis in self.space.items() if axis.grid is None]
        if self.num_samples > 1 and not drawn:
            raise ValueError(f"num_samples {self.num_samples} needs a key of space that is drawn; all are on a grid")
        factors = {f"space.{key}.grid": len(axis.grid) for key, axis in self.space.items() if axis.grid}
        factors |= {"seeds": len(self.seeds), "num_samples": self.num_samples}
        if (total := math.prod(factors.values())) > MOST_TRIALS:
            listed = " x ".join(f"{key} {factor:,}" for key, factor in factors.items() if factor > 1)
            raise ValueError(f"{listed} make {total:,} trials; a sweep has at most {MOST_TRIALS:,}")


class Origins(NamedTuple):
    """Where a sweep's trials come from, for messages. keys: dotted path of what `set` or `--set` changed → which of them."""

    sweep: str = "the sweep"
    base: str = "the base config"
    keys: Mapping[str, str] = MappingProxyType({})


def load_sweep(
    path: str | Path, overrides: list[str] | None = None
) -> tuple[SweepConfig, dict[str, JsonValue], Origins]:
    """Read a sweep's JSON file; also its base config as a tree, with `set` and the overrides applied, and the origins.

    overrides: `a.b=V`, a key of the sweep (output, trial.max_failures, …) or else of the trials' config.
    Raises ConfigError that names every mistake by its dotted path.
    """
    tree = read_tree(path)
    of_trials, given = [], dict[str, str]()
    for text in overrides or []:
        key, value = parse_setting(text)
        if key.split(".")[0] in SweepConfig.model_fields:
            assign(tree, key, value, f"--set {text!r}")
            given = {key: f"--set {key}", **given}
        else:
            of_trials.append((f"--set {key}", key, value))
    sweep = validate_as(SweepConfig, tree, str(path), given)
    origins = Origins(str(path), str(Path(path).parent / sweep.base), keys := {})
    base = read_tree(origins.base)
    if {"base", "space"} & base.keys():
        raise ConfigError(f"{path}: base {sweep.base} is a sweep's config; name a run's, such as quickstart.json")
    of_all = [(f"{path}: set", key, value) for key, value in sweep.set.items()]
    for where, key, value in [*of_all, *of_trials]:
        for searched in sweep.space:
            if f"{key}.".startswith(f"{searched}."):
                raise ConfigError(
                    f"{where}: {key!r} is set for all trials and searched in space ({searched!r}); remove one of them"
                )
        if key == SEED:
            raise ConfigError(f"{where}: use the sweep's list seeds for {SEED}")
        if key in OWN and value not in (None, False):
            raise ConfigError(f"{where}: {key!r} cannot be set for all trials; the sweep gives each its own")
        assign(base, key, value, f"{where}: {key!r}")
        keys[key] = where
    return sweep, base, origins


def parameters(sweep: SweepConfig) -> dict[str, Any]:
    """The sweep's settings as MLflow parameters, by dotted key."""
    tree = dump(sweep)
    del tree["$schema"]
    return flatten(tree)
