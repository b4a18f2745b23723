"""Group normalization as the U-Nets use it, with the sum, the affine map and the SiLU around it in one step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from warm_dist.networks import precision


def group_norm(
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
    """silu(GroupNorm(x + before) · (1 + scale) + shift), computed in float32 and rounded once, at its end.

    x: (B, C, H, W) float32 or bfloat16, in channels_last memory (other layouts are copied). weight, bias: (C,); before,
    scale, shift: (B, C) or None; each float32 or bfloat16. silu: False for no activation. Returns x's shape, type and
    channels_last layout. On a GPU it is `group_norm_kernels`, elsewhere `reference`.
    """
    x = x.contiguous(memory_format=torch.channels_last)  # copies nothing where the network's layout is kept
    if not precision.on_gpu(x):
        return reference(x, weight, bias, groups, eps, before=before, scale=scale, shift=shift, silu=silu)
    return fused(x, weight, bias, groups, eps, before=before, scale=scale, shift=shift, silu=silu)


def fused(
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
    """`group_norm` by one kernel, its gradients by another; x must be in channels_last memory."""
    from warm_dist.networks import group_norm_kernels as kernels  # imports Triton

    gain, offset = weight.float(), bias.float()
    if scale is not None:
        more = 1 + scale.float()
        gain, offset = gain * more, offset * more
    if shift is not None:
        offset = offset + shift.float()
    if gain.dim() != offset.dim():  # a shift without a scale
        gain = gain.expand_as(offset)
    before = None if before is None else before.contiguous()
    y: Tensor = kernels.forward(x, before, gain.contiguous(), offset.contiguous(), groups, eps, silu)[0]
    return y


def reference(
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
    """`group_norm` in plain PyTorch; with x in float64 all of it is.

    Half precision is widened first: PyTorch's own backward pass of it in this layout takes twice as long.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, channels = x.shape[:2]
    h = x.to(dtype)
    # PyTorch's variance is E[h²] - E[h]² in this layout: bring every group near zero, by its first pixel
    near = h.detach()[:, :, 0, 0]
    if before is not None:
        near = near + before.detach().to(dtype)
    near = near.reshape(batch, groups, -1).mean(2).repeat_interleave(channels // groups, dim=1)
    h = h + ((0 if before is None else before.to(dtype)) - near)[:, :, None, None]
    h = functional.group_norm(h, groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        h = h * (1 + scale.to(dtype))[:, :, None, None]
    if shift is not None:
        h = h + shift.to(dtype)[:, :, None, None]
    return (functional.silu(h) if silu else h).to(x.dtype)
