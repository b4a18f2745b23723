"""The weights of a network by their published names, to read and to change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warm_dist.networks.flat import published


def weight(network: nn.Module, name: str) -> Tensor:
    """A live view of one published tensor, a convolution's (O, I, h, w); attention's qkv in the network's own order."""
    found = next(tensor for tensor in published(network) if tensor.name == name)
    part = network.get_parameter(found.flat).detach()[found.start : found.stop].view(found.piece.used)
    return part.permute(0, 3, 1, 2) if part.ndim == 4 else part


def wake(network: nn.Module) -> nn.Module:
    """Give zero-initialised layers weights, so that nothing is hidden behind them."""
    for tensor in published(network):
        values = weight(network, tensor.name)
        if float(values.abs().max()) < 1e-2:
            torch.nn.init.normal_(values, std=0.1)
    return network


def scaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """In place of the group norm, whose layout is tested with its kernels: it keeps that of x, as they do."""
    for factor in (weight, scale):
        x = x if factor is None else x * factor.reshape(-1, x.shape[1], 1, 1)
    for term in (bias, before, shift):
        x = x if term is None else x + term.reshape(-1, x.shape[1], 1, 1)
    return nn.functional.silu(x) if silu else x
