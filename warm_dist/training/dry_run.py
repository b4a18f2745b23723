"""The needs of a run without running it: batch arithmetic, parameters, operations, peak memory per ZeRO stage.

The state's memory is a formula; that of a step comes from running it on fake tensors.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from warm_dist.config.batch import batch_equation, check_world_size, micro_batches
from warm_dist.config.load import dump
from warm_dist.config.run import Config

if TYPE_CHECKING:  # a table of many sizes needs no torch
    import torch
    from torch import Tensor

    from warm_dist.diffusion.heads import Network

IN_FLIGHT = 3  # steps whose inputs are on the device: one in use, two made ahead by `Prefetch`


def forward_bytes(stage: int, precision: str) -> int:
    """Bytes of a forward weight or its gradient; at stage 0 the network casts float32 weights."""
    return 2 if precision == "bf16" and stage else 4


def forward_dtype(config: Config, stage: int | None) -> torch.dtype:
    """The type of a forward weight. stage: of ZeRO, or None for engine "local"."""
    import torch

    return torch.bfloat16 if forward_bytes(stage or 0, config.parallel.precision) == 2 else torch.float32


def memory_bytes(
    parameters: int, size: int, stage: int, precision: str, num_emas: int = 1, offload: bool = False
) -> int:
    """Bytes of weights, gradients, Adam and EMAs on a rank's device, without activations.

    Stage 0 has float32 weights and gradients; higher stages add a float32 master partition to the forward weights.
    offload: master weights, Adam and EMAs are on the host. Source: ZeRO (arXiv 1910.02054), section 5.
    """
    shard, each = parameters / size, forward_bytes(stage, precision)
    weights = each * (shard if stage == 3 else parameters)
    gradients = each * (shard if stage >= 2 else parameters)
    adam = 8 * (shard if stage else parameters)
    master = 4 * shard if stage else 0
    state = 0 if offload else adam + master + 4 * num_emas * shard
    return int(weights + gradients + state)


def num_gathers(parameters: int) -> int:
    """How often stage 3 gathers a weight in a micro-batch."""
    from warm_dist.training.deepspeed_engine import KEPT

    return 1 if parameters <= KEPT else 2


class Passes(NamedTuple):
    """A micro-batch's forward and backward: at each allocation (bytes in use, gradients computed so far).

    The bytes are without weights and without the gradients of parameters, which a ZeRO stage keeps in its own way.
    """

    parameters: int
    history: list[tuple[int, int]]

    def peak(self, gradient_bytes: int) -> int:
        """The largest number of bytes in use when every gradient computed takes so many bytes."""
        return max(live + gradient_bytes * gradients for live, gradients in self.history)


def passes(config: Config, images: int, weights: torch.dtype, device: str = "cuda", compiled: bool = False) -> Passes:
    """Run the loss of so many images forward and backward on fake tensors. Arguments as `networks.memory.planned`."""
    from warm_dist.networks.memory import planned
    from warm_dist.networks.precision import DTYPES

    dtype = DTYPES[config.parallel.precision]
    heads = 1 if config.process.preconditioning == "per_frequency" else 2

    def blank(x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor:
        return x.repeat(1, heads, 1, 1)

    _loss(config, blank, 1)  # the matrices that the loss keeps for the whole process must not be fake ones
    with planned(config, device, dtype, weights, compiled) as (network, meter):
        parameters = list(network.train().parameters())

        def took(parameter: Tensor) -> None:
            meter.gradients += parameter.numel()
            parameter.grad = None

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(took)
        _loss(config, network, images).mean().backward()
    return Passes(sum(p.numel() for p in parameters), meter.history)


def _loss(config: Config, network: Network, images: int) -> Tensor:
    import torch

    from warm_dist.diffusion.per_frequency import loss_function
    from warm_dist.diffusion.process import Level
    from warm_dist.networks.memory import inputs

    x0, levels, _, labels, augment = inputs(config, images)
    level, noise = Level(levels.double(), levels.double()), torch.empty_like(x0)
    spectrum = torch.empty(x0.shape[2:], dtype=torch.float64)
    condition = (labels, augment) if config.train.augment else (labels,)
    return loss_function(config)(network, spectrum, x0, level, noise, condition).total


def peak_bytes(config: Config, size: int, stage: int | None, measured: Passes) -> int:
    """The most bytes that a rank's tensors take on its device in a step, after the first.

    stage: of ZeRO, or None for engine "local". measured: the passes of a micro-batch. What DeepSpeed allocates beside
    the state was measured on a CPU, see tests/integration/test_memory.py.
    """
    from warm_dist.training.deepspeed_engine import KEPT, REDUCED

    precision, (micro, accumulations) = config.parallel.precision, micro_batches(config, size)
    number, zero, offload = measured.parameters, stage or 0, bool(stage) and config.parallel.offload_optimizer
    each, emas = forward_bytes(zero, precision), 1 + len(config.train.ema_lengths)
    shard, bucket = number // size, each * min(number, REDUCED)
    state = memory_bytes(number, size, zero, precision, emas, offload)
    state -= each * (shard if zero >= 2 else number)  # gradients come and go
    state += _inputs_bytes(config, IN_FLIGHT * micro * accumulations - micro)
    if zero == 3:
        state += each * shard + bucket
        gathered = each * min(number, KEPT) if size > 1 else 0
        during, reducing = gathered + measured.peak(0), each * number + bucket
    else:
        kept = 0 if accumulations == 1 else each * (shard if zero == 2 else number)
        during = kept + measured.peak(each if zero == 2 or not kept else 0)
        # stage 2 reduces with each micro-batch, into the shard that it keeps
        reducing = each * number + (bucket if stage is not None or size > 1 else 0) + (kept if zero == 2 else 0)
    # the shard's gradients are joined, and then cast to float32, for Adam
    updating = 0 if not zero or offload else shard * (each + 4 + (each if each == 2 else 0))
    return state + max(during, reducing, updating)


def _inputs_bytes(config: Config, images: int) -> int:
    """Bytes of images and noise on the device, float32."""
    return images * 2 * 4 * config.data.channels * config.data.resolution**2


def dry_run(config: Config, size: int) -> str:
    """The text of `launch/train.py --dry-run`."""
    from warm_dist.networks.flops import size_of

    check_world_size(config, size)
    network = size_of(config)
    return "\n".join(
        [
            json.dumps(dump(config), indent=2),
            batch_equation(config, size),
            f"parameters: {network.parameters:,} ({network.parameters / 1e6:.1f} M)",
            f"operations: {network.flops / 1e9:.1f} GFLOP per image, forward and backward",
            *_memory(config, size, network.parameters),
        ]
    )


def _note(config: Config, stage: int | None, size: int) -> str:
    """What a stage holds that its neighbours do not."""
    parallel = config.parallel
    # compiled blocks cast their weights one at a time
    copied = stage == 0 and parallel.precision == "bf16" and not parallel.compile
    notes = {
        "buffers: a bf16 copy of the weights": copied,
        "optimizer on the GPU": stage == 0 and parallel.offload_optimizer,
        "buffers: gathered weights": stage == 3 and size > 1,
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def _memory(config: Config, size: int, parameters: int) -> list[str]:
    """Lines of the peak memory on a GPU, by engine and stage."""
    parallel, micro = config.parallel, micro_batches(config, size)[0]
    compiled, chosen = bool(parallel.compile), parallel.zero_stage if config.engine == "deepspeed" else None
    stages = (None,) if chosen is None else range(4)
    # a compiled block casts its weights where it needs them, so that one run is good for every stage
    dtypes = {forward_dtype(config, chosen if compiled else stage) for stage in stages}
    measured = {dtype: passes(config, micro, dtype, compiled=compiled) for dtype in dtypes}
    lines = [
        f"peak memory per rank on a GPU, {size} ranks, {micro} images, {parallel.precision}, "
        f"{'' if compiled else 'not '}compiled{', recomputing activations' * parallel.activation_checkpointing}"
        f"{', optimizer on the host' * parallel.offload_optimizer}, GiB:",
        "            state  activations, buffers  total",
    ]
    for stage in stages:
        dtype = forward_dtype(config, chosen if compiled else stage)
        emas, offload = 1 + len(config.train.ema_lengths), parallel.offload_optimizer and bool(stage)
        state = memory_bytes(parameters, size, stage or 0, parallel.precision, emas, offload) / 2**30
        total = peak_bytes(config, size, stage, measured[dtype]) / 2**30
        name = "local" if stage is None else f"ZeRO {stage}"
        mark = "  <- parallel.zero_stage" if stage is not None and stage == chosen else ""
        mark += f"  {note}" if (note := _note(config, stage, size)) else ""
        lines.append(f"  {name + ':':8}{state:8.3f} {total - state:21.3f} {total:6.2f}{mark}")
    if parallel.compile is None:
        # the shipped configs, the least of it with recomputation; to count it takes two to five times as long
        lines.append(
            "compiled, as by default on a GPU, activations take 3 to 10 % less; parallel.compile=true counts it"
        )
    return lines
