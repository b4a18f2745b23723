"""The interface of engines, and the reference engine in plain PyTorch.

An engine exposes its state as flat float32 fragments of named parameters; EMAs and checkpoints know no other sharding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warm_dist.config.batch import micro_batches
from warm_dist.config.run import Config
from warm_dist.distributed.world import World
from warm_dist.networks.compiled import Say, compile_blocks, compiles
from warm_dist.networks.precision import set_precision

STATE = ("master", "exp_avg", "exp_avg_sq")
PIECE = 2**16  # elements whose squares a CPU adds up in float32, 1e-7 off


@dataclass(frozen=True)
class Fragment:
    """A part of a flattened parameter and its Adam moments: views, (n,) float32 each, of the live state.

    Element k of a view is element start + k of the parameter `name`.
    """

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.master.numel()


def make_adam(parameters: Any, config: Config) -> torch.optim.Adam:
    """Adam with the config's settings."""
    train = config.train
    # fused: one kernel, and `found_inf` lets the device skip a non-finite update
    return torch.optim.Adam(parameters, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def ensure_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Any]) -> None:
    """Create Adam's state now, which it would do at the first step, so that a checkpoint can be loaded into it."""
    for p in parameters:
        if not optimizer.state[p]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def set_steps(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Set Adam's step count."""
    for state in optimizer.state.values():
        state["step"].fill_(float(num_steps))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, float32.

    On a CPU by pieces: PyTorch adds up a whole tensor's squares one after another there, and is 4e-3 off at 56 M elements.
    """
    parts = [part for g in gradients for part in ((g,) if g.is_cuda else g.reshape(-1).split(PIECE))]
    return nn.utils.get_total_norm(parts)


def clip_and_guard(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None, sharded: bool = False
) -> Tensor:
    """Clip by the total norm, and have Adam skip a non-finite update; returns the norm. No host sync.

    sharded: each rank has a part of the gradient, and the norm is that of all parts, which makes this a collective.
    """
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if sharded:
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]  # read by fused Adam
    return norm


def share_of(fragment: Fragment, rank: int, size: int) -> Fragment | None:
    """This rank's share of a fragment that every rank holds, or None if it is empty."""
    share = math.ceil(fragment.numel / size)
    low, high = min(rank * share, fragment.numel), min((rank + 1) * share, fragment.numel)
    if low == high:
        return None
    views = {key: getattr(fragment, key)[low:high] for key in STATE}
    return Fragment(fragment.name, fragment.start + low, **views)


class Engine(ABC):
    """A network with its optimizer. All calls are collectives: every rank must make them."""

    optimizer: torch.optim.Optimizer

    def __init__(self, module: nn.Module, config: Config, world: World, say: Say) -> None:
        self.module, self.config, self.world = module, config, world
        self.num_accumulation = micro_batches(config, world.size)[1]
        if compiles(config.parallel.compile, world.device):
            compile_blocks(module, config.parallel.compile_cache, say)
        set_precision(module, config.parallel.precision)

    @abstractmethod
    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor:
        """The network, see `heads.Network`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss, scaled by 1/num_accumulation."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip the gradient, update unless it is non-finite, clear it. Returns its norm, a 0-d tensor on the device."""

    @abstractmethod
    def after_load(self, num_steps: int) -> None:
        """After writing into `fragments`: set the step count and rebuild the forward weights."""

    def fragments(self) -> list[Fragment]:
        """The state in this rank's memory: all of it (the default) or, at ZeRO stages 1 to 3, 1/W of it."""
        ensure_state(self.optimizer, self.module.parameters())
        out = []
        for name, p in self.module.named_parameters():
            state = self.optimizer.state[p]
            out.append(Fragment(name, 0, p.data.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)))
        return out

    def shard(self) -> list[Fragment]:
        """This rank's part of the state; over all ranks, every element occurs exactly once."""
        return [part for f in self.fragments() if (part := share_of(f, self.world.rank, self.world.size))]


class LocalEngine(Engine):
    """Plain PyTorch, the reference for all engines. Several ranks average their gradients."""

    def __init__(self, module: nn.Module, config: Config, world: World, say: Say = print) -> None:
        super().__init__(module.to(world.device), config, world, say)
        self.parameters = list(module.parameters())
        self.optimizer = make_adam(self.parameters, config)

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor:
        return self.module(x, c_noise, c_blur, *condition)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        (loss / self.num_accumulation).backward()

    def step(self, lr: float) -> Tensor:
        if self.world.size > 1:
            flat = torch.cat([p.grad.view(-1) for p in self.parameters if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.world.size
            for p, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                p.grad = grad.view_as(p)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = clip_and_guard(self.optimizer, self.parameters, self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def after_load(self, num_steps: int) -> None:
        set_steps(self.optimizer, num_steps)
