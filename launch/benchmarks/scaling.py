"""Time, memory and bytes of a training step from one GPU to a thousand: formulas. docs/scaling.md.

What they take from measurements is one GPU's MFU and the time in which it waits for the host: `--measured`, else constants.
P parameters, W ranks, A accumulations. Weights and gradients take `forward_bytes` each a parameter: 2 in bf16 above stage 0.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from launch.benchmarks.contenders import ENGINES, parts_of
from warm_dist import errors
from warm_dist.config.load import read_tree, validate_as
from warm_dist.config.run import Config
from warm_dist.config.values import Fraction, Size
from warm_dist.errors import ConfigError
from warm_dist.training.dry_run import forward_bytes, memory_bytes, num_gathers

if TYPE_CHECKING:
    from warm_dist.networks.flops import NetworkSize

SIZES = (1, 8, 64, 256, 1024)
GATHERED = 50_000_000  # weights that DeepSpeed 0.19.8 gathers by one message, its stage3_prefetch_bucket_size
ADAM_TOUCHES = 7  # float32 values an element that Adam reads and writes: gradient; weight and both moments, twice
EMA_TOUCHES = 3  # and each EMA: weight; the average, twice


@dataclass(frozen=True)
class Machine:
    """What a rank computes and moves. All in operations or bytes a second, latency_s a message between two ranks.

    peak_flops: dense bf16. mfu: share of the precision's peak that the forward and backward pass reach while the GPU
    does not wait for the host; host_s: seconds a micro-batch that it waits. Bandwidths are what one rank sends in a
    ring: among the ranks_per_node of a node, and when the ring leaves it.
    """

    peak_flops: float
    mfu: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    ranks_per_node: int
    latency_s: float
    host_s: float = 0.0

    def bandwidth(self, size: int) -> float:
        """Of a ring over `size` ranks."""
        return self.node_bandwidth if size <= self.ranks_per_node else min(self.node_bandwidth, self.network_bandwidth)


# Peak and memory: NVIDIA's H100 SXM data sheet. Node: NVLink, 900 GB/s in both directions together. Network: the DGX H100
# data sheet's 8 ConnectX-7 of 400 Gb/s a node, each carrying one of eight rings. Latency: an assumption.
# MFU: EDM's README has this network at 2500 Mimg on 32 A100 in about 13 days: 0.147 of 312e12 operations a second, in
# which whatever the host costs is contained: host_s is 0 beside it.
DGX_H100 = Machine(989.4e12, 0.15, 3.35e12, 450e9, 400e9, 8, 10e-6)
# The same GPUs in nodes with one network card of 100 Gb/s.
ETHERNET = Machine(989.4e12, 0.15, 3.35e12, 450e9, 12.5e9, 8, 20e-6)


def sent_bytes(parameters: int, size: int, stage: int, precision: str, accumulations: int = 1) -> int:
    """Bytes that a rank sends in a step, by rings: (W-1)/W of n for a reduce-scatter or an all-gather of n bytes.

    Stages 0 and 1 exchange gradients once a step: an all-reduce, which is a reduce-scatter and an all-gather; DeepSpeed's
    stage 1 reduces by it too, and gathers the weights besides. Stage 2 keeps 1/W of the gradients and so reduces
    every micro-batch, also by all-reduce. Stage 3 gathers the weights in every micro-batch, those of a large network
    twice, and reduce-scatters the gradients. Source: ZeRO, section 7; which collective: DeepSpeed 0.19.8's source.
    """
    unit = (size - 1) / size * parameters * forward_bytes(stage, precision)
    return int(
        unit * {0: 2, 1: 2 + 1, 2: 2 * accumulations + 1, 3: (num_gathers(parameters) + 1) * accumulations}[stage]
    )


def messages(stage: int, parameters: int, accumulations: int = 1) -> int:
    """Collectives a step that wait for one another.

    Stage 3 gathers the root's weights, then GATHERED together ahead of their use, and reduces as stage 2 does.
    """
    gathers = num_gathers(parameters) * (1 + math.ceil(parameters / GATHERED))
    return {0: 1, 1: 2, 2: accumulations + 1, 3: (gathers + 1) * accumulations}[stage]


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts, nothing overlapped: an upper bound. images: the global batch. sent: bytes a rank."""

    images: int
    sent: int
    compute_s: float
    communication_s: float
    update_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.communication_s + self.update_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the step in which the ranks compute what one rank alone would compute."""
        return self.compute_s / self.seconds


def step(machine: Machine, config: Config, network: NetworkSize, ranks: int, stage: int) -> Step:
    """One training step on `ranks` ranks; a micro-batch shrinks with a rank's share of the batch.

    Lanes are ignored: they are legal up to data.num_lanes ranks, which can be raised to the batch size.
    """
    precision, images = config.parallel.precision, config.train.batch_size
    share = images / ranks
    accumulations = math.ceil(share / (config.train.micro_batch_size or share))
    again = 4 / 3 if config.parallel.activation_checkpointing else 1  # the forward once more
    peak = machine.peak_flops / (1 if precision == "bf16" else 2)  # MFU in fp32 is of TF32's peak, half of bf16's
    compute = share * network.flops * again / (peak * machine.mfu) + accumulations * machine.host_s
    sent = sent_bytes(network.parameters, ranks, stage, precision, accumulations)
    hops = 2 * math.ceil(math.log2(ranks))  # a tree's, there and back
    waits = messages(stage, network.parameters, accumulations) * hops * machine.latency_s
    shard = network.parameters / ranks
    touched = 4 * ADAM_TOUCHES * (shard if stage else network.parameters)
    touched += 4 * EMA_TOUCHES * (1 + len(config.train.ema_lengths)) * shard
    return Step(images, sent, compute, sent / machine.bandwidth(ranks) + waits, touched / machine.memory_bandwidth)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("needs printable characters alone")  # a terminal obeys others
    return text


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[str, Field(pattern=r"^(zero[0-3]|[a-z_]+)-(fp32|bf16)(-compiled)?$")]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]


class Part(BaseModel):
    """Base of a report's parts: strict and frozen; other keys than these are left alone."""

    model_config = ConfigDict(frozen=True, strict=True)


class Figures(Part):
    """Median, minimum and maximum over rounds."""

    median: Rate
    min: Rate
    max: Rate

    def model_post_init(self, context: Any) -> None:
        if not self.min <= self.median <= self.max:
            raise ValueError(f"median {self.median:g} is not between min {self.min:g} and max {self.max:g}")


class Row(Part):
    """One contender's figures, see `gpu.row`."""

    images_per_s: Figures
    mfu: Annotated[float, Field(ge=1e-9, le=1)] | None
    wait_share: Fraction | None

    def model_post_init(self, context: Any) -> None:
        if self.mfu is not None and self.mfu > 1 - (self.wait_share or 0):
            raise ValueError(
                f"mfu {self.mfu:g} in the time that wait_share {self.wait_share:g} leaves is above the peak"
            )


class Measured(Part):
    """A report, see `gpu.report`."""

    device: Text
    config: Text
    images: Size
    micro_batches: Size
    rows: dict[Name, Row]

    def model_post_init(self, context: Any) -> None:
        if not self.steps:
            raise ValueError(
                "rows has no training step with an MFU, as a GPU gives it, with --set parallel.peak_flops=N where the "
                "GPU's peak is unknown"
            )

    @property
    def steps(self) -> list[str]:
        """The names of training steps with an MFU."""
        return [name for name, row in self.rows.items() if parts_of(name)[0] in ENGINES and row.mfu is not None]


def read_measured(path: Path) -> Measured:
    """Read a report. Raises ConfigError, which names the file and the first field that cannot be true."""
    try:
        return validate_as(Measured, read_tree(path), f"--measured {path}")
    except ConfigError as error:
        raise ConfigError(f"{str(error).splitlines()[0]} (it takes what launch/bench.py gpu --json prints)") from None


def nearest(measured: Measured, stage: int, precision: str) -> str:
    """The measured training step most like the one at a stage: its stage counts first, then precision, then compiling."""

    def distance(name: str) -> tuple[int, bool, bool, bool]:
        engine, its, compiled = parts_of(name)
        own = 0 if engine == "local" else int(engine[-1])
        return abs(own - stage), its != precision, not compiled, engine == "local"

    return min(measured.steps, key=distance)


def as_measured(machine: Machine, measured: Measured | None, stage: int, precision: str) -> Machine:
    """The machine with the MFU and the host's time that were measured at the nearest stage; as it is without `measured`.

    A step of t seconds in which the GPU waits a share w: its kernels take t (1 - w), so they reach MFU / (1 - w), and
    each micro-batch waits t w / their number.
    """
    if measured is None:
        return machine
    row = measured.rows[nearest(measured, stage, precision)]
    share, seconds = row.wait_share or 0.0, measured.images / row.images_per_s.median
    assert row.mfu is not None
    return replace(machine, mfu=row.mfu / (1 - share), host_s=seconds * share / measured.micro_batches)


def checkpoint_bytes(parameters: int, num_emas: int = 1) -> int:
    """Bytes of one checkpoint of all ranks together: master weights, both moments and every EMA in float32."""
    return 4 * (3 + num_emas) * parameters


def table(config: Config, network: NetworkSize, measured: Measured | None = None) -> str:
    """Every stage from 1 to 1024 GPUs on both machines, as text. measured: what `bench.py gpu --json` printed."""
    machines, precision, emas = {"DGX H100": DGX_H100, "H100, 100 Gb/s a node": ETHERNET}, config.parallel.precision, 1
    emas += len(config.train.ema_lengths)
    lines = [
        f"{network.parameters / 1e6:.1f} M parameters, {network.flops / 1e9:.1f} GFLOP an image (forward and backward), "
        f"batch {config.train.batch_size}, {precision}, {emas} EMAs",
        f"checkpoint: {checkpoint_bytes(network.parameters, emas) / 1e9:.2f} GB",
        *([] if measured is None else told(measured, precision)),
        "",
        f"{'GPUs':>5}{'ZeRO':>5}{'GiB a GPU':>11}{'offloaded':>11}{'GB sent':>9}",
    ]
    lines[-1] += "".join(f"{f'{name}: ms':>28}{'images/s':>10}{'compute':>9}" for name in machines)
    for ranks in SIZES:
        for stage in range(4):
            gib = [
                memory_bytes(network.parameters, ranks, stage, precision, emas, offload) / 2**30
                for offload in ((False, True) if stage else (False,))
            ]
            steps = [
                step(as_measured(machine, measured, stage, precision), config, network, ranks, stage)
                for machine in machines.values()
            ]
            row = f"{ranks:5}{stage:5}{gib[0]:11.2f}" + (f"{gib[1]:11.2f}" if stage else f"{'':11}")
            row += f"{steps[0].sent / 1e9:9.2f}"
            lines.append(
                row + "".join(f"{1e3 * s.seconds:28.1f}{s.images_per_s:10.0f}{s.efficiency:9.1%}" for s in steps)
            )
    return "\n".join(lines)


def told(measured: Measured, precision: str) -> list[str]:
    """Lines about what each stage takes of the measurements."""
    names = [nearest(measured, stage, precision) for stage in range(4)]
    machines = [as_measured(DGX_H100, measured, stage, precision) for stage in range(4)]
    return [
        f"measured on {measured.device}: {measured.config}, {measured.images} images a step",
        *(
            f"  stage {stage}: MFU {machine.mfu:.3f}, and a micro-batch waits {1e3 * machine.host_s:.1f} ms, as {name}"
            for stage, (name, machine) in enumerate(zip(names, machines, strict=True))
        ),
    ]


def scaling(args: argparse.Namespace) -> int:
    """The subcommand `scaling`."""
    from warm_dist.config.run import load_config
    from warm_dist.networks.flops import size_of

    config = load_config(args.config, args.set)
    measured = read_measured(args.measured) if args.measured else None
    print(table(config, size_of(config), measured))
    return errors.EXIT_OK
