"""A run's config: one key a fact, strict and frozen.

No secret has a key here: boto3's own chain (environment, profile, instance role) provides S3 credentials.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from warm_dist.config.bnr import AnyBNR, Cold, LogUniformBNR, PathBNR, UniformBNR
from warm_dist.config.load import override, read_tree, validate_as
from warm_dist.config.urls import URL, Download, LocalPath, Place, Server
from warm_dist.config.values import Count, Fraction, Name, NonNegative, Positive, PositiveFloat, Section, Size, whole
from warm_dist.errors import ConfigError


class DataConfig(Section):
    """Which data set to train on, and how its images are read and shuffled."""

    manifest: Place = Field(description="URL of manifest.parquet: s3://bucket/prefix/manifest.parquet or a local path")
    endpoint_url: Server | None = Field(None, description="S3 endpoint, e.g. http://127.0.0.1:8333; null: AWS")
    resolution: Size = Field(description="height = width, pixels; must equal the manifest's")
    channels: Size = Field(3, description="colour channels of an image; must equal the manifest's")
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="0: unconditional; else must equal the manifest's"
    )
    num_lanes: Positive = Field(description="image streams: divides batch_size, is a multiple of the world size")
    chunk: Positive = Field(64, description="images per ranged GET; whole chunks are shuffled over the data set")
    window: Positive = Field(1024, description="images shuffled among each other inside a lane")
    reader_threads: Positive = Field(2, description="threads of each rank that fetch and decode")
    buffer_bytes: Positive = Field(268_435_456, description="read buffer of a rank; at least three batches are held")
    cache_dir: LocalPath | None = Field(None, description="local folder, shared by the node's ranks, that caches reads")
    cache_bytes: Positive = Field(50_000_000_000, description="most bytes kept in cache_dir")


class ProcessConfig(Section):
    """The forward process: how much blur and noise training images get, and how the loss weighs the two heads."""

    bnr: AnyBNR = Field(description="alpha/sigma: a number (0: EDM), a path over sigma, drawn per image, or cold")
    sigma_data: Literal["measured"] | PositiveFloat = Field(
        "measured", description="'measured': the manifest's power spectrum; a number: a 1/f^2 spectrum of this size"
    )
    p_mean: Annotated[float, Field(ge=-20, le=20)] = Field(-1.2, description="mean of ln sigma in training")
    p_std: Annotated[float, Field(gt=0, le=20)] = Field(1.2, description="standard deviation of ln sigma in training")
    preconditioning: Literal["two_head", "per_frequency"] = Field(
        "two_head", description="per_frequency: one-head ablation"
    )
    residual_weight: Literal["one", "balanced", "denoiser", "sampler"] = Field(
        "one",
        description="weight of the residual head's loss: 1; min(1, c_out,R^2 / c_out,b^2); that ratio; or that ratio "
        "times the share of the error which reaches a sample",
    )


class NetworkConfig(Section):
    """The two-head U-Net, with EDM's names."""

    arch: Literal["ddpmpp", "ncsnpp", "adm"] = Field(description="EDM's DDPM++, NCSN++ or ADM")
    channels: Size = Field(description="feature channels that channel_mult multiplies")
    channel_mult: Annotated[tuple[Size, ...], Field(min_length=1)] = Field(description="width per resolution level")
    num_blocks: Annotated[int, Field(gt=0, le=1000)] = Field(description="residual blocks at each resolution")
    attention_resolutions: tuple[Positive, ...] = Field((), description="resolutions with self-attention, pixels")
    dropout: Fraction = 0.0

    def model_post_init(self, context: Any) -> None:
        if self.channels % 2 or self.channels < 4:  # as many cosines as sines, with two frequencies or more
            raise ValueError(f"network.channels must be even and at least 4, is {self.channels}")

    def heads(self, width: int) -> int:
        """Heads of self-attention over so many channels. Source: EDM (arXiv 2206.00364), table 7."""
        return max(1, width // 64) if self.arch == "adm" else 1

    def check_heads(self, resolution: int) -> None:
        """Check that heads share the channels evenly wherever images of `resolution` meet attention. Raises ValueError."""
        for level, multiple in enumerate(self.channel_mult):
            last = level == len(self.channel_mult) - 1  # the middle blocks' width, with attention at any resolution
            width = self.channels * multiple
            heads = self.heads(width)
            if width % heads and (last or resolution >> level in self.attention_resolutions):
                raise ValueError(
                    f"network.channels {self.channels} x channel_mult {multiple} = {width} cannot be shared among "
                    f"{heads} attention heads: arch adm has one per 64 channels"
                )


class TrainConfig(Section):
    """Batch, optimizer (Adam), augmentation, EMAs, and how often to log and save. Lengths are in images (nimg)."""

    seed: Count = 0
    total_nimg: Positive = Field(description="images to train on; a multiple of batch_size")
    batch_size: Positive = Field(description="images per step over all ranks")
    micro_batch_size: Positive | None = Field(None, description="images per rank and backward; null: all at once")
    lr: PositiveFloat = Field(description="learning rate between ramp and decay")
    lr_ramp_nimg: Count = Field(0, description="linear warm-up over the first so many images")
    lr_decay_nimg: Count = Field(0, description="linear decay to 0 over the last so many images")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="Adam's")
    eps: PositiveFloat = Field(1e-8, description="Adam's")
    clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    horizontal_flips: bool = Field(False, description="mirror half of the images at random")
    augment: Fraction = Field(0.0, description="probability of each EDM augmentation; the network sees which were used")
    label_dropout: Fraction = Field(0.0, description="share of images whose class is hidden")
    ema_half_life_nimg: Positive = Field(description="half-life of the weights' exponential moving average, images")
    ema_ramp: PositiveFloat | None = Field(0.05, description="limits the half-life to this multiple of nimg, as in EDM")
    ema_lengths: tuple[Annotated[float, Field(ge=1e-3, le=0.25)], ...] = Field(
        (), description="also keep power-function EMAs of these relative widths sigma_rel (EDM2: [0.05, 0.1])"
    )
    snapshot_nimg: Positive | None = Field(
        None, description="images between permanent copies of them, for launch/ema.py"
    )
    max_nonfinite: Positive = Field(1, description="end after so many non-finite steps in a row; none is applied")
    log_nimg: Positive = Field(description="images between two lines of metrics.jsonl")
    save_nimg: Positive = Field(description="images between two checkpoints")


class ParallelConfig(Section):
    """Precision, sharding, memory savings, and how ranks wait for each other."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole)] = Field(
        1, description="DeepSpeed ZeRO stage; ignored by engine local"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward: less memory")
    offload_optimizer: bool = Field(False, description="ZeRO 1-3: master weights, Adam and EMA in the host's memory")
    compile: bool | None = Field(None, description="torch.compile the residual blocks; null: on CUDA")
    compile_cache: LocalPath | None = Field(None, description="local folder of compiled kernels; null: torch's own")
    peak_flops: PositiveFloat | None = Field(None, description="a device's peak FLOP/s, for MFU; null: known GPUs")
    timeout_s: Annotated[int, Field(gt=0, le=1_000_000)] = Field(
        120, description="how long a rank waits for the others, seconds"
    )
    preemption_file: LocalPath | None = Field(
        None, description="once it exists on any node: save and stop, as after SIGTERM"
    )


class CheckpointConfig(Section):
    """Where checkpoints go besides the run's folder, and which of them stay."""

    url: Place | None = Field(None, description="also upload them to s3://bucket/prefix or a folder; null: no")
    endpoint_url: Server | None = Field(None, description="S3 endpoint of url; null: AWS")
    keep_last: Positive = Field(2, description="newest checkpoints to keep")
    keep_every_nimg: Positive | None = Field(None, description="also keep the checkpoints at multiples of this nimg")


Levels = Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
Grid = Annotated[
    Annotated[Literal["edm", "log_linear"], Tag("grid name")] | Annotated[Levels, Tag("grid list")],
    Discriminator(lambda value: "grid list" if isinstance(value, list | tuple) else "grid name"),
]


class SamplerConfig(Section):
    """How images are generated: method, path, noise levels, guidance."""

    method: Literal["heun", "first_order", "multistep", "churn", "ancestral", "cold"] = Field(
        "ancestral", description="the default is the best of docs/results.md; heun is EDM's and the paper's"
    )
    num_steps: Annotated[int, Field(ge=2, le=100_000)] = Field(
        35, description="heun and churn cost 2 num_steps - 1 evaluations"
    )
    bnr: PathBNR | None = Field(None, description="the path to sample along; null: the one of training")
    grid: Grid = Field("edm", description="levels of sigma (cold: alpha): a name, or num_steps falling numbers above 0")
    sigma_min: PositiveFloat = Field(0.002, description="lowest level above 0, data units")
    sigma_max: PositiveFloat = Field(80.0, description="first level, data units")
    rho: PositiveFloat = Field(7.0, description="exponent of grid edm: higher puts more levels near sigma_min")
    start: Literal["measured", "plain"] = Field(
        "measured", description="initial noise per mode with the data's mean and spectrum, or sigma_max^2 I"
    )
    eta: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="ancestral only: 0 is DDIM")
    s_churn: NonNegative = Field(40.0, description="churn only, as are s_min, s_max and s_noise: EDM's names")
    s_min: NonNegative = 0.05
    s_max: PositiveFloat = 50.0
    s_noise: PositiveFloat = 1.003
    classes: Literal["data", "even"] = Field("data", description="drawn by their shares of the data, or evenly")
    guidance: NonNegative = Field(1.0, description="1: none; w: x̂ = guide + w (x̂ - guide)")
    guide: LocalPath | None = Field(
        None, description="weights file of a weaker network; null: this network without class"
    )
    precision: Literal["fp32", "bf16"] | None = Field(None, description="of the network; null: parallel.precision")

    def model_post_init(self, context: Any) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}")
        if isinstance(self.grid, tuple):
            if any(low >= high for high, low in pairwise(self.grid)):
                raise ValueError("grid must fall from each entry to the next")
            if len(self.grid) != self.num_steps:
                raise ValueError(f"grid has {len(self.grid)} entries, num_steps is {self.num_steps}")


class EvalConfig(Section):
    """The Fréchet distance during training: how often, of how many images, with which features."""

    eval_nimg: Positive = Field(description="evaluate every so many images, and at the end")
    before_training: bool = Field(True, description="also evaluate the untrained network")
    num_images: Annotated[int, Field(ge=2)] = Field(description="images to generate")
    num_blocks: Positive = Field(3, description="blocks of seeds in the last evaluation, for mean ± spread")
    extractor: Literal["lite0", "pixels", "inception", "torchscript"] = "lite0"
    extractor_url: Download | None = Field(
        None, description="inception-2015-12-05.pt or the TorchScript file: path, http(s)://, s3:// (data.endpoint_url)"
    )
    extractor_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(None, description="of that file")
    extractor_bf16: bool = Field(False, description="the extractor in bfloat16: faster, and not called FID")
    reference_images: Annotated[int, Field(ge=2)] | None = Field(None, description="real images compared; null: all")
    kid_images: Count = Field(5000, description="generated and real images for KID, precision and recall; 0: none")
    cache_dir: LocalPath | None = Field(
        None, description="local folder for real images' statistics; null: beside the manifest"
    )
    batch_size: Positive | None = Field(
        None, description="images per rank and batch; null: as many as fit into the GPU, 64 on a CPU"
    )
    grid: Annotated[int, Field(ge=1, le=32)] = Field(8, description="the sample picture is grid x grid images")
    seed: Count = 0

    def model_post_init(self, context: Any) -> None:
        given = self.extractor in ("inception", "torchscript")
        if given and not (self.extractor_url and self.extractor_sha256):
            raise ValueError(f"extractor {self.extractor!r} needs eval.extractor_url and eval.extractor_sha256")
        if self.extractor_bf16 and self.extractor == "pixels":
            raise ValueError("eval.extractor_bf16 needs a network as extractor; pixels is always float32")


class TrackingConfig(Section):
    """Where metrics are shown besides metrics.jsonl: MLflow and Prometheus."""

    mlflow_url: Server | None = Field(
        None, description="MLflow server, e.g. http://127.0.0.1:5000; null: metrics.jsonl only"
    )
    experiment: Annotated[str, Field(min_length=1)] = "warm-dist"
    run_name: str | None = Field(None, description="null: the name of the output folder")
    parent_run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(None, description="MLflow parent run")
    log_model: bool = Field(True, description="at the end, log the EMA weights as an MLflow model that samples images")
    registered_model: Name | None = Field(None, description="also register the model under this name; null: do not")
    prometheus_port: Annotated[int, Field(gt=0, lt=65536)] | None = Field(
        None, description="port where rank 0 serves its metrics as Prometheus text; null: none"
    )
    prometheus_host: Annotated[str, Field(min_length=1)] = Field(
        "127.0.0.1", description="address that prometheus_port is bound to"
    )

    def model_post_init(self, context: Any) -> None:
        if self.registered_model and not self.log_model:
            raise ValueError("tracking.registered_model needs tracking.log_model")


class Config(Section):
    """Everything that describes a training run."""

    schema_url: URL | None = Field(None, alias="$schema")
    description: str = ""
    output: LocalPath = Field(description="the run's folder")
    engine: Literal["deepspeed", "local"] = Field("deepspeed", description="local: plain PyTorch without sharding")
    data: DataConfig
    process: ProcessConfig
    network: NetworkConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampler: SamplerConfig = SamplerConfig()
    eval: EvalConfig | None = Field(None, description="null: no evaluation during training")
    tracking: TrackingConfig = TrackingConfig()

    def model_post_init(self, context: Any) -> None:
        data, train, net = self.data, self.train, self.network
        if train.batch_size % data.num_lanes:
            raise ValueError(
                f"train.batch_size {train.batch_size} is not a multiple of data.num_lanes {data.num_lanes}"
            )
        intervals = {f"train.{key}_nimg": getattr(train, f"{key}_nimg") for key in ("total", "log", "save", "snapshot")}
        intervals["checkpoint.keep_every_nimg"] = self.checkpoint.keep_every_nimg
        intervals["eval.eval_nimg"] = self.eval and self.eval.eval_nimg
        for name, value in intervals.items():
            if value is not None and value % train.batch_size:
                raise ValueError(f"{name} {value} is not a multiple of train.batch_size {train.batch_size}")
        if train.snapshot_nimg is not None and not train.ema_lengths:
            raise ValueError("train.snapshot_nimg has nothing to keep: set train.ema_lengths, e.g. [0.05, 0.1]")
        if len(set(train.ema_lengths)) < len(train.ema_lengths):
            raise ValueError("train.ema_lengths names a length twice")
        self._check_engine()
        self._check_url()
        halvings = len(net.channel_mult) - 1
        if data.resolution % 2**halvings:
            raise ValueError(
                f"data.resolution {data.resolution} cannot be halved {halvings} times (network.channel_mult)"
            )
        resolutions = [data.resolution >> level for level in range(halvings + 1)]
        for resolution in net.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(f"network.attention_resolutions has {resolution}; the network works at {resolutions}")
        net.check_heads(data.resolution)
        if train.lr_decay_nimg > train.total_nimg:
            raise ValueError(f"train.lr_decay_nimg {train.lr_decay_nimg} exceeds train.total_nimg {train.total_nimg}")
        check_sampling(self, self.sampler)

    def _check_url(self) -> None:
        url = self.checkpoint.url
        if url and "://" not in url and Path(url).resolve().is_relative_to(Path(self.output).resolve()):
            raise ValueError(f"checkpoint.url {url} is in output, the run's own folder; name another folder, or null")

    def _check_engine(self) -> None:
        parallel, sharded = self.parallel, self.engine == "deepspeed" and self.parallel.zero_stage > 0
        if parallel.offload_optimizer and not sharded:
            raise ValueError("parallel.offload_optimizer needs engine deepspeed and parallel.zero_stage 1, 2 or 3")


def sampling_precision(config: Config, sampler: SamplerConfig) -> str:
    """What a network trained by `config` computes in when it is sampled: "fp32" or "bf16"."""
    return sampler.precision or config.parallel.precision


def check_sampling(config: Config, sampler: SamplerConfig) -> None:
    """Check that a network trained by `config` can be sampled as `sampler` says. Raises ConfigError if not."""
    trained = config.process.bnr
    if isinstance(trained, UniformBNR | LogUniformBNR) and sampler.bnr is None:
        raise ConfigError("sampler.bnr is needed: training draws a random BNR, sampling follows one path")
    if isinstance(trained, Cold):
        if sampler.bnr is not None:
            raise ConfigError("sampler.bnr has no meaning for process.bnr cold, whose noise stays at its floor")
        if trained.highest(config.data.resolution) <= trained.alpha_min:
            raise ConfigError("process.bnr.alpha_min must be below alpha_max, which is half the width by default")
    elif sampler.method == "cold":
        raise ConfigError("sampler.method 'cold' only deblurs: it needs process.bnr cold")
    if sampler.guidance != 1 and sampler.guide is None and not (config.data.num_classes and config.train.label_dropout):
        raise ConfigError(
            "sampler.guidance needs sampler.guide (a weaker network's weights), or a network also trained without "
            "classes: data.num_classes and train.label_dropout above 0"
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON file, apply `a.b=V` overrides (V: JSON if it parses, else a string), validate.

    Raises ConfigError, which names every wrong key by its dotted path and suggests a known key for an unknown one.
    """
    tree = read_tree(path)
    for setting in overrides or []:
        override(tree, setting)
    given = [setting.partition("=")[0] for setting in reversed(overrides or [])]
    return validate(tree, str(path), {key: f"--set {key}" for key in given})


def validate(tree: dict[str, Any], name: str = "config", given: Mapping[str, str] | None = None) -> Config:
    """Validate a tree as a run's config. Raises ConfigError with one line per mistake, see `validate_as`."""
    return validate_as(Config, tree, name, given)
