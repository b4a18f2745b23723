"""Group normalization on a GPU: one Triton kernel for the forward pass, one for the backward, as operators of torch.

Both kernels compute y = act(xhat · gain + offset), xhat = (x + before - mean) · rstd, of NHWC images; `before`, gain and
offset are numbers per image and channel. One program has one image and a block of whole groups. It goes over the pixels
twice: for sums over them, then for the result; the second time they come from the L2 cache, the latest first. Memory is
what such a kernel waits for: x is read and y written once. This file imports Triton, so import it where a GPU is used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, before_ptr, gain_ptr, offset_ptr, y_ptr, mean_ptr, rstd_ptr,
    pixels, channels, gain_stride, eps,
    SIZE: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BEFORE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks = channels // (SIZE * COUNT)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # a batch can have more than 2^31 numbers, an image cannot
    block = tl.program_id(0) % blocks
    column = tl.arange(0, COLUMNS)
    inside = column < SIZE * COUNT
    group = tl.arange(0, GROUPS)
    member = (group[:, None] == (column // SIZE)[None, :]) & inside[None, :]
    channel = block * (SIZE * COUNT) + column
    x_ptr += image * pixels * channels
    y_ptr += image * pixels * channels
    gain = tl.load(gain_ptr + image * gain_stride + channel, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + image * gain_stride + channel, mask=inside, other=0.0)
    before = tl.full((COLUMNS,), 0.0, tl.float32)
    if BEFORE:
        before += tl.load(before_ptr + image * channels + channel, mask=inside, other=0.0).to(tl.float32)

    # sums of x - first and its square: of x itself they would lose all digits where |mean| is large beside the std
    first = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    squares = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, pixels, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < pixels)[:, None] & inside[None, :]
        x = tl.load(
            x_ptr + row[:, None] * channels + channel[None, :], mask=here, other=0.0, eviction_policy="evict_last"
        )
        centred = tl.where(here, x.to(tl.float32) - first[None, :], 0.0)
        sums += centred
        squares += centred * centred
    delta = tl.sum(sums, axis=0) / pixels
    spread = tl.maximum(tl.sum(squares, axis=0) - pixels * delta * delta, 0.0)

    # Chan's formula: the spread of a group is that within its channels and that of their means
    channel_mean = first + before + delta
    mean = tl.sum(tl.where(member, channel_mean[None, :], 0.0), axis=1) / SIZE
    apart = tl.where(member, channel_mean[None, :] - mean[:, None], 0.0)
    total = tl.sum(tl.where(member, spread[None, :], 0.0) + pixels * apart * apart, axis=1)
    rstd = tl.rsqrt(total / (pixels * SIZE) + eps)
    statistics = image * (channels // SIZE) + block * COUNT + group
    tl.store(mean_ptr + statistics, mean, mask=group < COUNT)
    tl.store(rstd_ptr + statistics, rstd, mask=group < COUNT)

    away = before - tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    scale = gain * tl.sum(tl.where(member, rstd[:, None], 0.0), axis=0)
    tiles = (pixels + ROWS - 1) // ROWS
    for tile in range(tiles):
        row = (tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        here = (row < pixels)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = (x + away[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, at, here, away, rstd, gain, offset, SILU: tl.constexpr, POLICY: tl.constexpr
):  # fmt: skip
    """A tile of dz, the gradient before the activation, and of xhat."""
    x = tl.load(x_ptr + at, mask=here, other=0.0, eviction_policy=POLICY).to(tl.float32)
    dz = tl.load(dy_ptr + at, mask=here, other=0.0, eviction_policy=POLICY).to(tl.float32)
    xhat = (x + away[None, :]) * rstd[None, :]
    if SILU:
        z = xhat * gain[None, :] + offset[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dz, xhat


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, before_ptr, gain_ptr, offset_ptr, mean_ptr, rstd_ptr, dx_ptr, dbefore_ptr, dgain_ptr, doffset_ptr,
    pixels, channels, gain_stride,
    SIZE: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BEFORE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks = channels // (SIZE * COUNT)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = tl.arange(0, COLUMNS)
    inside = column < SIZE * COUNT
    member = (tl.arange(0, GROUPS)[:, None] == (column // SIZE)[None, :]) & inside[None, :]
    channel = block * (SIZE * COUNT) + column
    x_ptr += image * pixels * channels
    dy_ptr += image * pixels * channels
    dx_ptr += image * pixels * channels
    gain = tl.load(gain_ptr + image * gain_stride + channel, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + image * gain_stride + channel, mask=inside, other=0.0)
    statistics = image * (channels // SIZE) + block * COUNT + column // SIZE
    rstd = tl.load(rstd_ptr + statistics, mask=inside, other=0.0)
    away = -tl.load(mean_ptr + statistics, mask=inside, other=0.0)
    if BEFORE:
        away += tl.load(before_ptr + image * channels + channel, mask=inside, other=0.0).to(tl.float32)

    # per channel: the sums of dz, of dz · xhat, and of xhat
    doffset_sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    dgain_sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    xhat_sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, pixels, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < pixels)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        dz, xhat = _gradient(dy_ptr, x_ptr, at, here, away, rstd, gain, offset, SILU, "evict_last")
        doffset_sums += dz
        dgain_sums += dz * xhat
        if BEFORE:
            xhat_sums += tl.where(here, xhat, 0.0)
    doffset = tl.sum(doffset_sums, axis=0)
    dgain = tl.sum(dgain_sums, axis=0)
    tl.store(doffset_ptr + image * channels + channel, doffset, mask=inside)
    tl.store(dgain_ptr + image * channels + channel, dgain, mask=inside)

    # per group: the means of dxhat and of dxhat · xhat, times rstd, where dxhat = dz · gain
    group_mean = tl.sum(tl.where(member, (gain * doffset)[None, :], 0.0), axis=1) / (pixels * SIZE)
    group_slope = tl.sum(tl.where(member, (gain * dgain)[None, :], 0.0), axis=1) / (pixels * SIZE)
    mean = rstd * tl.sum(tl.where(member, group_mean[:, None], 0.0), axis=0)
    slope = rstd * tl.sum(tl.where(member, group_slope[:, None], 0.0), axis=0)
    scale = gain * rstd
    if BEFORE:  # the sum of dx over the pixels
        dbefore = scale * doffset - pixels * mean - slope * tl.sum(xhat_sums, axis=0)
        tl.store(dbefore_ptr + image * channels + channel, dbefore, mask=inside)

    tiles = (pixels + ROWS - 1) // ROWS
    for tile in range(tiles):
        row = (tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        here = (row < pixels)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        dz, xhat = _gradient(dy_ptr, x_ptr, at, here, away, rstd, gain, offset, SILU, "evict_first")
        dx = scale[None, :] * dz - mean[None, :] - slope[None, :] * xhat
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=here)


class Tile(NamedTuple):
    """What one program holds at a time: `groups` groups of `size` channels, in rows × columns numbers."""

    size: int
    groups: int
    columns: int
    rows: int
    warps: int

    def constants(self) -> dict[str, int]:
        """The constants of both kernels, and the warps of their launch."""
        groups = {"COUNT": self.groups, "GROUPS": _power_of_two(self.groups)}
        return {"SIZE": self.size, **groups, "COLUMNS": self.columns, "ROWS": self.rows, "num_warps": self.warps}


def tile_for(channels: int, groups: int, pixels: int, per_thread: int) -> Tile:
    """The tile of an image of so many channels and pixels; per_thread: numbers of a tile that a thread holds.

    Chosen by a rule: to try several costs a compilation each, at every start.
    """
    size = channels // groups

    def merit(count: int) -> tuple[int, float, int]:
        columns = _power_of_two(size * count)
        # rows that begin at 16 bytes are read as such vectors; then few idle columns; then many programs
        return math.gcd(size * count, 8), size * count / columns, -columns

    counts = [n for n in range(1, groups + 1) if groups % n == 0]
    # memory is read in pieces of 64 bytes, 32 numbers of bf16; 128 columns are enough, except of a larger group
    wide = [n for n in counts if size * n >= min(32, channels) and _power_of_two(size * n) <= 128]
    count = max(wide or counts[:1], key=merit)
    columns = _power_of_two(size * count)
    # a thread has four tiles to read at least, or few threads: for small images the reductions at their ends count
    warps = max(1, min(16, _power_of_two(pixels * columns) // (32 * per_thread * 4)))
    rows = max(1, min(_power_of_two(pixels), 32 * warps * per_thread // columns))
    return Tile(size, count, columns, rows, warps)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


# numbers of a tile that a thread holds; with its sums and the channels' constants these are 64 registers in the shipped
# networks, so that two programs of 16 warps share a multiprocessor: one reads memory while the other adds up
FORWARD_PER_THREAD, BACKWARD_PER_THREAD = 8, 4


@triton_op("warm_dist::group_norm", mutates_args={})
def forward(
    x: Tensor, before: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """act(GroupNorm(x + before) · gain + offset) with the (B, G) float32 means and reciprocal stds of its groups.

    x: (B, C, H, W) in channels_last memory. before: (B, C) or None. gain, offset: both (B, C) or both (C,), float32.
    """
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    mean = torch.empty((batch, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    tile = tile_for(channels, groups, height * width, FORWARD_PER_THREAD)
    wrap_triton(_forward)[(batch * (groups // tile.groups),)](
        x, x if before is None else before, gain, offset, y, mean, rstd,
        height * width, channels, channels if gain.dim() == 2 else 0, eps,
        BEFORE=before is not None, SILU=silu, **tile.constants(),
    )  # fmt: skip
    return y, mean, rstd


@triton_op("warm_dist::group_norm_backward", mutates_args={})
def backward(
    dy: Tensor, x: Tensor, before: Tensor | None, gain: Tensor, offset: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, before, gain and offset, the latter three (B, C) float32; that of no `before` is empty."""
    batch, channels, height, width = x.shape
    groups = mean.shape[1]
    dx = torch.empty_like(x)
    dgain = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
    doffset = torch.empty_like(dgain)
    dbefore = torch.empty_like(dgain if before is not None else dgain[:0])
    tile = tile_for(channels, groups, height * width, BACKWARD_PER_THREAD)
    wrap_triton(_backward)[(batch * (groups // tile.groups),)](
        dy, x, x if before is None else before, gain, offset, mean, rstd, dx, dbefore, dgain, doffset,
        height * width, channels, channels if gain.dim() == 2 else 0,
        BEFORE=before is not None, SILU=silu, **tile.constants(),
    )  # fmt: skip
    return dx, dbefore, dgain, doffset


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, before, gain, offset, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, before, gain, offset, *output[1:])
    ctx.set_materialize_grads(False)  # mean and rstd have none


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, before, gain, offset, mean, rstd = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dbefore, dgain, doffset = backward(dy, x, before, gain, offset, mean, rstd, ctx.silu)
    if gain.dim() == 1:
        dgain, doffset = dgain.sum(0), doffset.sum(0)
    return dx, None if before is None else dbefore.to(before.dtype), dgain, doffset, None, None, None


forward.register_autograd(_gradients, setup_context=_save)
