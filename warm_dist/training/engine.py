"""Optimizer engines behind one protocol, and the reference in plain PyTorch.

Engines show their state as flat float32 fragments of named parameters, which is all that EMA and checkpoints know of sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warm_dist.config.batch import micro_batches
from warm_dist.config.run import Config
from warm_dist.distributed.world import World

STATE = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """values[k] is element start + k of the flattened parameter `name`; the tensors are views of live float32 state."""

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def numel(self) -> int:
        return self.master.numel()


class Engine(Protocol):
    """What the training loop needs. All calls but the properties are collectives: every rank makes them, always."""

    module: nn.Module

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor: ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss, scaled by 1/num_accumulation."""

    def step(self, lr: float) -> Tensor:
        """Clip, apply unless non-finite, clear gradients. Returns the gradient norm, a 0-d tensor on the device."""

    def fragments(self) -> list[Fragment]:
        """State that lies in this rank's memory: all of it at stage 0, 1/W of it above."""

    def shard(self) -> list[Fragment]:
        """The part of `fragments` that this rank answers for: over all ranks, every element exactly once."""

    def after_load(self, num_steps: int) -> None:
        """After fragments were written into: set the step count and rebuild the forward weights."""


def make_adam(parameters: Any, config: Config) -> torch.optim.Adam:
    train = config.train
    # fused: one kernel, and `found_inf` lets the device itself leave out a non-finite update
    return torch.optim.Adam(parameters, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def ensure_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Any]) -> None:
    """Adam makes its state at the first step; a checkpoint needs it before."""
    for p in parameters:
        if not optimizer.state[p]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def set_steps(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(num_steps))


def clip_and_guard(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None) -> Tensor:
    """Clip by the total norm, and have the next step left out if it is not finite: on the device, without a sync."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]  # read by fused Adam
    return norm


def share_of(fragment: Fragment, rank: int, size: int) -> Fragment | None:
    """This rank's share of a fragment that every rank holds."""
    share = math.ceil(fragment.numel / size)
    low, high = min(rank * share, fragment.numel), min((rank + 1) * share, fragment.numel)
    if low == high:
        return None
    views = {key: getattr(fragment, key)[low:high] for key in STATE}
    return Fragment(fragment.name, fragment.start + low, **views)


class BaseEngine:
    """Autocast around the network, and whole-parameter fragments (stage 0 and LocalEngine)."""

    def __init__(self, module: nn.Module, config: Config, world: World, autocast: bool) -> None:
        self.module, self.config, self.world = module, config, world
        self.num_accumulation = micro_batches(config, world.size)[1]
        self._autocast = autocast
        self._names = {id(p): name for name, p in module.named_parameters()}

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            yield

    def _whole(self, optimizer: torch.optim.Optimizer) -> list[Fragment]:
        ensure_state(optimizer, self.module.parameters())
        out = []
        for name, p in self.module.named_parameters():
            state = optimizer.state[p]
            out.append(Fragment(name, 0, p.data.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)))
        return out


class LocalEngine(BaseEngine):
    """Plain PyTorch: what every other engine must agree with. Several ranks average their gradients."""

    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        super().__init__(module.to(world.device), config, world, autocast=config.parallel.precision == "bf16")
        if config.parallel.compile:
            module.compile()  # in place: parameters keep their names
        self.parameters = list(module.parameters())
        self.optimizer = make_adam(self.parameters, config)

    def __call__(self, x: Tensor, c_noise: Tensor, c_blur: Tensor, *condition: Tensor | None) -> Tensor:
        with self._precision():
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

    def fragments(self) -> list[Fragment]:
        return self._whole(self.optimizer)

    def shard(self) -> list[Fragment]:
        parts = (share_of(f, self.world.rank, self.world.size) for f in self.fragments())
        return [part for part in parts if part is not None]

    def after_load(self, num_steps: int) -> None:
        set_steps(self.optimizer, num_steps)
