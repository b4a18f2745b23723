"""One JSON file describes a run: one fact, one key; strict, frozen, and every mistake named by its dotted path.

No secret has a key here: S3 credentials come through boto3's own chain (environment, profile, instance role).
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from warm_dist.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class DataConfig(Section):
    manifest: str = Field(description="URL of manifest.parquet: s3://bucket/prefix/manifest.parquet or a local path")
    endpoint_url: str | None = Field(
        None, description="an S3 endpoint other than AWS's own, e.g. http://127.0.0.1:8333"
    )
    resolution: Positive = Field(description="height = width, pixels; must equal the manifest's")
    channels: Positive = 3
    num_classes: Annotated[int, Field(ge=0)] = Field(0, description="0: unconditional; else must equal the manifest's")
    num_lanes: Positive = Field(description="batch_size % num_lanes = 0 and num_lanes % world size = 0")
    chunk: Positive = Field(64, description="images per ranged GET; whole chunks are shuffled over the data set")
    window: Positive = Field(1024, description="images shuffled among each other inside a lane")
    reader_threads: Positive = 2
    buffer_bytes: Positive = Field(268_435_456, description="most bytes that one rank's reader holds")


class ProcessConfig(Section):
    bnr: NonNegative = Field(description="blur-to-noise ratio alpha/sigma; 0 is EDM")
    sigma_data: Literal["measured"] | PositiveFloat = Field(
        "measured", description="'measured' uses the manifest's power spectrum; a number, a 1/f^2 spectrum of that size"
    )
    p_mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    p_std: PositiveFloat = 1.2
    residual_weight: Literal["one", "balanced"] = Field(
        "one", description="weight of the residual head's loss: 1, or min(1, c_out,R^2 / c_out,b^2)"
    )


class NetworkConfig(Section):
    arch: Literal["ddpmpp", "adm"]
    channels: Positive
    channel_mult: Annotated[tuple[Positive, ...], Field(min_length=1)]
    num_blocks: Positive
    attention_resolutions: tuple[Positive, ...] = ()
    dropout: Fraction = 0.0


class TrainConfig(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    total_nimg: Positive = Field(description="images to train on; a multiple of batch_size")
    batch_size: Positive
    micro_batch_size: Positive | None = Field(None, description="images per rank and backward; null: all at once")
    lr: PositiveFloat
    lr_ramp_nimg: Annotated[int, Field(ge=0)] = 0
    lr_decay_nimg: Annotated[int, Field(ge=0)] = Field(0, description="linear decay to 0 over the last so many images")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    horizontal_flips: bool = False
    label_dropout: Fraction = Field(0.0, description="share of images whose class is hidden")
    ema_half_life_nimg: Positive
    ema_ramp: PositiveFloat | None = Field(0.05, description="half-life at most so many times nimg (EDM's ramp)")
    log_nimg: Positive
    save_nimg: Positive
    keep_last: Positive = 2


class ParallelConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    timeout_s: Positive = Field(120, description="how long a rank waits for another before it gives up")


class SamplerConfig(Section):
    method: Literal["heun", "first_order"] = "heun"
    num_steps: Annotated[int, Field(ge=2)] = 18
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0
    start: Literal["measured", "plain"] = Field(
        "measured", description="initial noise per mode with the data's mean and spectrum, or sigma_max^2 I"
    )


class EvalConfig(Section):
    eval_nimg: Positive = Field(description="Fréchet distance every so many images, before training, and at the end")
    num_images: Annotated[int, Field(ge=2)]
    extractor: Literal["lite0", "pixels", "inception"] = "lite0"
    extractor_url: str | None = Field(None, description="inception only: path or URL of inception-2015-12-05.pt")
    extractor_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    reference_images: Annotated[int, Field(ge=2)] | None = Field(None, description="real images compared; null: all")
    batch_size: Positive = 64
    grid: Annotated[int, Field(ge=1, le=32)] = Field(8, description="the sample picture is grid x grid images")
    seed: Annotated[int, Field(ge=0)] = 0


class TrackingConfig(Section):
    mlflow_url: str | None = Field(
        None, description="MLflow server, e.g. http://127.0.0.1:5000; null: metrics.jsonl only"
    )
    experiment: str = "warm-dist"
    run_name: str | None = None


class Config(Section):
    schema_url: str | None = Field(None, alias="$schema")
    description: str = ""
    output: str = Field(description="the run's folder")
    engine: Literal["deepspeed", "local"] = "deepspeed"
    data: DataConfig
    process: ProcessConfig
    network: NetworkConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    sampler: SamplerConfig = SamplerConfig()
    eval: EvalConfig | None = Field(None, description="null: no evaluation during training")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        data, train, net = self.data, self.train, self.network
        if train.batch_size % data.num_lanes:
            raise ValueError(
                f"train.batch_size {train.batch_size} is not a multiple of data.num_lanes {data.num_lanes}"
            )
        for key in ("total_nimg", "log_nimg", "save_nimg"):
            if getattr(train, key) % train.batch_size:
                raise ValueError(
                    f"train.{key} {getattr(train, key)} is not a multiple of train.batch_size {train.batch_size}"
                )
        if self.eval and self.eval.eval_nimg % train.batch_size:
            raise ValueError(
                f"eval.eval_nimg {self.eval.eval_nimg} is not a multiple of train.batch_size {train.batch_size}"
            )
        if (
            self.eval
            and self.eval.extractor == "inception"
            and not (self.eval.extractor_url and self.eval.extractor_sha256)
        ):
            raise ValueError("eval.extractor 'inception' needs eval.extractor_url and eval.extractor_sha256")
        if data.resolution % 2 ** (len(net.channel_mult) - 1):
            raise ValueError(
                f"data.resolution {data.resolution} cannot be halved {len(net.channel_mult) - 1} times (network.channel_mult)"
            )
        resolutions = [data.resolution >> level for level in range(len(net.channel_mult))]
        for resolution in net.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(f"network.attention_resolutions has {resolution}; the network works at {resolutions}")
        if self.sampler.sigma_min >= self.sampler.sigma_max:
            raise ValueError("sampler.sigma_min must be below sampler.sigma_max")
        if train.lr_decay_nimg > train.total_nimg:
            raise ValueError(f"train.lr_decay_nimg {train.lr_decay_nimg} exceeds train.total_nimg {train.total_nimg}")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON file, apply `a.b=V` overrides (V: JSON if it parses, else a string), validate.

    Raises ConfigError that names every offending key by its dotted path, with the nearest known key for a misspelt one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    tree = parse_json(text, str(path))
    for override in overrides or []:
        _apply(tree, override)
    return validate(tree, str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """JSON object → dict; duplicate keys, NaN and Infinity are ConfigErrors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in items:
            if key in out:
                raise ConfigError(f"{name}: the key {key!r} stands twice in one object")
            out[key] = value
        return out

    def constant(value: str) -> float:
        raise ConfigError(f"{name}: {value} is not a number that JSON knows")

    try:
        tree = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: holds a {type(tree).__name__}, needs an object")
    return tree


def validate(tree: dict[str, Any], name: str = "config") -> Config:
    """dict → Config, or a ConfigError with one line per mistake."""
    try:
        # by way of JSON, so that lists become tuples while strictness about types stays
        return Config.model_validate_json(json.dumps(tree, allow_nan=False))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{name}: {error}") from None
        lines = dict.fromkeys(_explain(dict(item)) for item in error.errors())
        raise ConfigError(f"{name}: " + "\n  ".join(lines)) from None


def _explain(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"] if part not in ("constrained-float", "literal['measured']")]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, known_keys(), n=1, cutoff=0.5) or difflib.get_close_matches(
            location[-1], [key.split(".")[-1] for key in known_keys()], n=1
        )
        return f"unknown key {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    if item["type"] == "missing":
        return f"missing key {path!r}"
    if not path:
        return str(item["msg"]).removeprefix("Value error, ")
    return f"{path!r}: {item['msg']}, got {item['input']!r}"


def _sections(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    out = {prefix: model}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                out.update(_sections(kind, f"{prefix}{name}."))
    return out


def known_keys() -> list[str]:
    """Every key as a dotted path, sections included."""
    return [
        prefix + (field.alias or name)
        for prefix, model in _sections(Config).items()
        for name, field in model.model_fields.items()
    ]


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: needs the form a.b=VALUE")
    try:
        value = json.loads(text, parse_constant=lambda name: math.nan)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--set {override!r}: the value must be finite")
    *parents, leaf = path.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if child is None:
            child = tree[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is not a section")
        tree = child
    tree[leaf] = value


def dump(config: Config) -> dict[str, Any]:
    """Every key with its value, defaults included, ready for JSON; `validate` gives back an equal Config."""
    return config.model_dump(mode="json", by_alias=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, the form of `--set` and of MLflow's parameters."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def json_schema() -> dict[str, Any]:
    """The JSON Schema that editors read by way of the `$schema` key."""
    return Config.model_json_schema(by_alias=True)


if __name__ == "__main__":  # python -m warm_dist.config > configs/schema.json
    print(json.dumps(json_schema(), indent=2))
