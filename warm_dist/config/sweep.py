"""What describes a sweep: a run's config, the keys that are searched, how trials are scheduled, what each may use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from warm_dist.config.load import assign, dump, flatten, parse_setting, read_tree, validate_as
from warm_dist.config.values import NonNegative, Positive, Section
from warm_dist.errors import ConfigError

Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveOne = Annotated[float, Field(ge=1.1, allow_inf_nan=False)]  # nearer to 1 there would be thousands of rungs
Key = Annotated[str, Field(pattern=r"^[a-z]\w*(\.[a-z]\w*)*$")]
Seed = Annotated[int, Field(ge=0)]
SEED = "train.seed"


class Axis(Section):
    """How one key is searched: exactly one of the four. A grid is run whole; the others are drawn num_samples times."""

    grid: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = Field(None, description="each of these values")
    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = Field(None, description="one at random")
    uniform: tuple[Finite, Finite] | None = Field(None, description="[low, high]")
    log_uniform: tuple[Finite, Finite] | None = Field(None, description="[low, high], uniform in the logarithm")

    @model_validator(mode="after")
    def _one(self) -> Axis:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"needs exactly one of grid, choice, uniform, log_uniform; has {sorted(given) or 'none'}")
        for low, high in [value for value in (self.uniform, self.log_uniform) if value is not None]:
            if low >= high:
                raise ValueError(f"the low end {low:g} must be below the high end {high:g}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform needs a low end above 0, got {self.log_uniform[0]:g}")
        return self


class AshaConfig(Section):
    """Asynchronous successive halving by the Fréchet distance over nimg. Source: Li et al. 2020, arXiv 1810.05934."""

    kind: Literal["asha"]
    grace_nimg: Positive = Field(description="no trial is stopped before; rungs are here and at each further power")
    reduction_factor: AboveOne = Field(3.0, description="of the trials at a rung the best 1/factor go on")


class TrialConfig(Section):
    """What each trial is given, and how often it may fail."""

    nodes: Positive = Field(1, description="machines of one trial; above 1, processes_per_node on each")
    processes_per_node: Positive = 1
    cpus_per_process: Positive = 1
    gpus_per_process: NonNegative = Field(0.0, description="0: on the CPU; a fraction shares a GPU among trials")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        2, description="how often a crashed or lost trial is started again, from its last checkpoint"
    )

    @model_validator(mode="after")
    def _gpus(self) -> TrialConfig:
        if self.gpus_per_process > 1 or (0 < self.gpus_per_process < 1 and self.processes > 1):
            raise ValueError("gpus_per_process must be 0 or 1, or a fraction for a trial of one process")
        return self

    @property
    def processes(self) -> int:
        """Of the whole trial."""
        return self.nodes * self.processes_per_node

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray sets aside for it on one machine."""
        cpus = float(self.processes_per_node * self.cpus_per_process)
        gpus = self.processes_per_node * self.gpus_per_process
        return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


class SurfaceConfig(Section):
    """After the sweep the best trial's network is sampled at each NFE, along each BNR."""

    nfe: Annotated[tuple[Positive, ...], Field(min_length=1)]
    bnr: tuple[NonNegative, ...] = Field((), description="none: the path it was trained on")
    num_images: Annotated[int, Field(ge=2)] | None = Field(None, description="null: eval.num_images")
    num_blocks: Positive = 1


class SweepConfig(Section):
    schema_url: str | None = Field(None, alias="$schema")
    description: str = ""
    base: str = Field(description="the config of a run, from this file's folder; the sweep changes keys of it")
    set: dict[Key, JsonValue] = Field(
        default_factory=dict, description="keys of it, by dotted path, that all trials have otherwise"
    )
    output: Annotated[str, Field(pattern=r"^(s3://[^/:]+(/.*)?|[^:]+)$")] = Field(
        description="folder of trials and results: a local or shared one, or s3://bucket/prefix"
    )
    endpoint_url: str | None = Field(None, description="the S3 endpoint of output, if other than AWS's own")
    node_dir: str = Field(
        "~/.cache/warm-dist/sweeps",
        description="local folder of each machine: data cache, real images' statistics, and the trials' runs when output "
        "is s3://",
    )
    space: dict[Key, Axis] = Field(default_factory=dict, description="keys of a run's config, by dotted path")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field((0,), description="each point is trained with each")
    num_samples: Positive = Field(1, description="draws of the keys that are not on a grid, at each point of the grid")
    search_seed: Seed = Field(0, description="of those draws")
    scheduler: AshaConfig | None = Field(None, description="null: every trial is trained to its end")
    trial: TrialConfig = TrialConfig()
    max_concurrent: Positive | None = Field(None, description="null: as many trials at a time as the resources allow")
    ray_address: str | None = Field(
        None, description="of a Ray cluster to join; null: the variable RAY_ADDRESS, or else Ray is started here"
    )
    surface: SurfaceConfig | None = None
    registered_model: str | None = Field(None, description="MLflow's name for the best trial's model")

    @model_validator(mode="after")
    def _searched(self) -> SweepConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names one twice")
        drawn = [key for key, axis in self.space.items() if axis.grid is None]
        if self.num_samples > 1 and not drawn:
            raise ValueError(f"num_samples {self.num_samples} needs a key of space that is drawn; all are on a grid")
        return self


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> tuple[SweepConfig, dict[str, JsonValue]]:
    """Read a sweep's JSON; returns it, and its base config as a tree with `set` and the overrides in it.

    overrides: `a.b=V`, a key of the sweep's (output, trial.max_failures, …) or else of the trials' config.
    Raises ConfigError that names every mistake by its dotted path.
    """
    tree = read_tree(path)
    of_trials = []
    for text in overrides or []:
        key, value = parse_setting(text)
        if key.split(".")[0] in SweepConfig.model_fields:
            assign(tree, key, value, f"--set {text!r}")
        else:
            of_trials.append((key, value))
    sweep = validate_as(SweepConfig, tree, str(path))
    base = read_tree(Path(path).parent / sweep.base)
    for key, value in [*sweep.set.items(), *of_trials]:
        if key == SEED:
            raise ConfigError(f"{path}: set {SEED}: it is the list seeds of the sweep")
        assign(base, key, value, f"{path}: set {key!r}")
    return sweep, base


def parameters(sweep: SweepConfig) -> dict[str, Any]:
    """The sweep as MLflow's parameters: its keys, dotted."""
    tree = dump(sweep)
    del tree["$schema"]
    return flatten(tree)
