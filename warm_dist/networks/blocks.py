"""Building blocks of the U-Nets: level embeddings, resampling, residual blocks, attention.

Layers, parameter shapes and the order of operations are EDM's, so that its published weights can be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from warm_dist.networks import precision
from warm_dist.networks.flat import Flat, views
from warm_dist.networks.group_norm import group_norm

Init = Callable[[nn.Module], None]


def xavier_init(gain: float = 1.0) -> Init:
    """Uniform weights in ±gain·sqrt(6/(fan_in + fan_out)), zero bias. Source: EDM, DDPM++ rows of table 7."""
    return lambda layer: _uniform(layer, lambda fan_in, fan_out: gain * math.sqrt(6 / (fan_in + fan_out)), bias=0.0)


def kaiming_init(gain: float = 1.0) -> Init:
    """Uniform weights and bias in ±gain·sqrt(3/fan_in). Source: EDM, ADM rows of table 7."""
    return lambda layer: _uniform(layer, lambda fan_in, fan_out: gain * math.sqrt(3 / fan_in), bias=1.0)


def _uniform(layer: nn.Module, bound: Callable[[int, int], float], bias: float) -> None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"cannot initialise a {type(layer).__name__}")
    area = math.prod(layer.weight.shape[2:])
    limit = bound(layer.weight.shape[1] * area, layer.weight.shape[0] * area)
    with torch.no_grad():
        layer.weight.uniform_(-limit, limit)
        if layer.bias is not None:
            layer.bias.uniform_(-limit * bias, limit * bias)


def initialised(layer: nn.Module, init: Init) -> nn.Module:
    """Initialise a layer's parameters with `init` and return it."""
    init(layer)
    return layer


def num_groups(channels: int) -> int:
    """EDM's number of groups, min(32, C/4), or the next smaller number that divides C."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)


class Norm(nn.Module):
    """The parameters of a group normalization: weight one, bias zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))


def positional(values: Tensor, channels: int, endpoint: bool) -> Tensor:
    """Cosines and sines of (B,) values at channels/2 frequencies from 1 down to 1e-4, (B, channels)."""
    exponents = torch.arange(channels // 2, dtype=torch.float32, device=values.device)
    frequencies = 1e-4 ** (exponents / (channels // 2 - (1 if endpoint else 0)))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fourier(values: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines of (B,) values at the given (channels/2,) frequencies, (B, channels).

    Source: NCSN++ (arXiv 2011.13456).
    """
    angles = values.float()[:, None] * (2 * math.pi * frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def filter_kernel(taps: tuple[int, ...]) -> Tensor:
    """The separable low-pass filter with these taps, (1, 1, n, n), normalized to sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


def resample(x: Tensor, mode: str | None, kernel: Tensor | None = None) -> Tensor:
    """(B, C, H, W) → (B, C, 2H, 2W) for mode "up", (B, C, H/2, W/2) for "down", unchanged for None; channels-last.

    kernel: a low-pass filter (1, 1, n, n) of even size n, or None for a box (n = 2).
    """
    if mode is None:
        return x
    if kernel is None:
        return double(x) if mode == "up" else functional.avg_pool2d(x, 2)
    padding, per_channel = (kernel.shape[-1] - 1) // 2, kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    if mode == "up":
        return functional.conv_transpose2d(x, 4 * per_channel, stride=2, padding=padding, groups=x.shape[1])
    return functional.conv2d(x, per_channel, stride=2, padding=padding, groups=x.shape[1])


def double(x: Tensor) -> Tensor:
    """Every pixel four times, (B, C, H, W) → (B, C, 2H, 2W): its gradient is a sum of slices, without atomics."""
    b, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1)
    rows = torch.stack([pixels, pixels], dim=3).view(b, h, 2 * w, c)
    return torch.stack([rows, rows], dim=2).view(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution of a channels-last (B, C, H, W) as the matrix product that it is. weight: (C_out, C).

    On a CPU in float32 it stays a convolution: oneDNN's takes half the time of MKL's product on an EPYC.
    """
    if not precision.on_gpu(x) and x.dtype == torch.float32:
        x = x.contiguous(memory_format=torch.channels_last)  # copies nothing where the network's layout is kept
        return functional.conv2d(x, weight[:, :, None, None], bias)
    return functional.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def attend(x: Tensor, w: dict[str, Tensor], num_heads: int, groups: int, eps: float) -> Tensor:
    """Self-attention over the H·W pixels, without the residual sum, (B, C, H, W) → (B, C, H, W).

    w: the tensors norm, qkv and proj of `attention_layers` under "attention.".
    """
    b, c, height, width = x.shape
    x = group_norm(x, w["attention.norm.weight"], w["attention.norm.bias"], groups, eps, silu=False)
    qkv = pointwise(x, w["attention.qkv.weight"], w["attention.qkv.bias"]).permute(0, 2, 3, 1)
    # each (B, heads, H·W, C/heads) with the last axis contiguous, as flash attention needs it
    q, k, v = qkv.reshape(b, height * width, 3, num_heads, c // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    if x.dtype == torch.bfloat16 and not precision.on_gpu(x):
        q, k, v = q.float(), k.float(), v.float()  # the backward pass in bfloat16 takes four times as long on a CPU
    out = functional.scaled_dot_product_attention(q, k, v).to(x.dtype).transpose(1, 2).reshape(b, height, width, c)
    return pointwise(out.permute(0, 3, 1, 2), w["attention.proj.weight"], w["attention.proj.bias"])


class AuxiliaryDown(Flat):
    """A level of NCSN++'s image pyramid: a 3x3 convolution, then the low-pass filter with stride 2."""

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, o: BlockOptions) -> None:
        super().__init__()
        self.flatten({"conv": initialised(nn.Conv2d(in_channels, out_channels, 3), o.init)})
        self.register_buffer("kernel", filter_kernel(o.filter), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H/2, W/2)."""
        with self.keeping():
            w = views(self.flat.to(x.dtype), self.pieces)
            x = functional.conv2d(x, w["conv.weight"], w["conv.bias"], padding=2)
        return functional.conv2d(x, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


class BlockOptions:
    """Options shared by all blocks of a network; the presets are EDM's DDPM++, NCSN++ and ADM."""

    def __init__(self, arch: str, emb_channels: int, dropout: float) -> None:
        adm = arch == "adm"
        self.emb_channels, self.dropout = emb_channels, dropout
        self.adaptive_scale = adm  # the embedding scales and shifts, or only shifts
        self.project_resampled = not adm  # a 1x1 convolution on every resampling skip
        self.filter = (1, 3, 3, 1) if arch == "ncsnpp" else (1, 1)
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.eps = 1e-5 if adm else 1e-6
        self.init = kaiming_init(math.sqrt(1 / 3)) if adm else xavier_init()
        self.init_zero = kaiming_init(0.0) if adm else xavier_init(1e-5)
        self.init_attention = self.init if adm else xavier_init(math.sqrt(0.2))


class Block(Flat):
    """Residual block: norm, SiLU, resampling, convolution, embedding, norm, SiLU, dropout, convolution; then attention.

    mode: "up" or "down" to resample, or None. num_heads: of attention, 0 for none. `compute` is what `forward` calls, a
    function of tensors alone, for a compiler to replace.
    """

    kernel: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, o: BlockOptions, mode: str | None = None, num_heads: int = 0
    ) -> None:
        super().__init__()
        self.options, self.mode = o, mode
        self.groups = num_groups(in_channels), num_groups(out_channels)
        smooth = mode is not None and len(o.filter) > 2
        self.register_buffer("kernel", filter_kernel(o.filter) if smooth else None, persistent=False)
        layers: dict[str, nn.Module] = {
            "norm0": Norm(in_channels),
            "conv0": initialised(nn.Conv2d(in_channels, out_channels, 3), o.init),
            "affine": initialised(nn.Linear(o.emb_channels, out_channels * (2 if o.adaptive_scale else 1)), o.init),
            "norm1": Norm(out_channels),
            "conv1": initialised(nn.Conv2d(out_channels, out_channels, 3), o.init_zero),
        }
        if out_channels != in_channels or (mode and o.project_resampled):
            layers["skip"] = initialised(nn.Conv2d(in_channels, out_channels, 1), o.init)
        self.num_heads = num_heads
        if num_heads:
            layers["attention.norm"] = Norm(out_channels)
            layers["attention.qkv"] = initialised(nn.Conv2d(out_channels, 3 * out_channels, 1), o.init_attention)
            layers["attention.proj"] = initialised(nn.Conv2d(out_channels, out_channels, 1), o.init_zero)
        self.flatten(layers, self.num_heads)
        self.compute: Callable[[Tensor, Tensor, Tensor], Tensor] = self._compute

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C_in, H, W), emb: (B, emb_channels) → (B, C_out, H', W'), H' = H, 2H or H/2 by the mode.

        In the dtype of x, channels-last.
        """
        with self.keeping():
            return self.compute(self.flat, x, emb)

    def _compute(self, flat: Tensor, x: Tensor, emb: Tensor) -> Tensor:
        o, w = self.options, views(flat.to(x.dtype), self.pieces)
        h = group_norm(x, w["norm0.weight"], w["norm0.bias"], self.groups[0], o.eps)
        h = functional.conv2d(resample(h, self.mode, self.kernel), w["conv0.weight"], w["conv0.bias"], padding=1)
        level = functional.linear(emb, w["affine.weight"], w["affine.bias"])
        scale, shift = level.chunk(2, dim=1) if o.adaptive_scale else (None, None)
        before = None if o.adaptive_scale else level
        norm1 = w["norm1.weight"], w["norm1.bias"], self.groups[1], o.eps
        h = group_norm(h, *norm1, before=before, scale=scale, shift=shift)
        if o.dropout:
            h = functional.dropout(h, o.dropout, self.training)
        h = functional.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
        skip = resample(x, self.mode, self.kernel)
        if "skip.weight" in w:
            skip = pointwise(skip, w["skip.weight"], w["skip.bias"])
        h = scaled_sum(h, skip, o.skip_scale)
        return scaled_sum(h, attend(h, w, self.num_heads, self.groups[1], o.eps), o.skip_scale) if self.num_heads else h


def scaled_sum(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(a + b)·scale."""
    return a + b if scale == 1.0 else (a + b).mul_(scale)
