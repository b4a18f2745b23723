"""Building blocks of the U-Nets: level embeddings, resampling, residual blocks, attention.

Layers, parameter shapes and the order of operations are EDM's, so that its published weights can be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalization with EDM's min(32, C/4) groups, or the next smaller number that divides C."""
    groups = next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


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
    """(B, C, H, W) → (B, C, 2H, 2W) for mode "up", (B, C, H/2, W/2) for "down", unchanged for None.

    kernel: a low-pass filter (1, 1, n, n) of even size n, or None for a box (n = 2).
    """
    if mode is None:
        return x
    if kernel is None:
        return functional.interpolate(x, scale_factor=2) if mode == "up" else functional.avg_pool2d(x, 2)
    padding, per_channel = (kernel.shape[-1] - 1) // 2, kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    if mode == "up":
        return functional.conv_transpose2d(x, 4 * per_channel, stride=2, padding=padding, groups=x.shape[1])
    return functional.conv2d(x, per_channel, stride=2, padding=padding, groups=x.shape[1])


class AuxiliaryDown(nn.Module):
    """A level of NCSN++'s image pyramid: a 3x3 convolution, then the low-pass filter with stride 2."""

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, o: BlockOptions) -> None:
        super().__init__()
        self.conv = initialised(nn.Conv2d(in_channels, out_channels, 3, padding=2), o.init)
        self.register_buffer("kernel", filter_kernel(o.filter), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H/2, W/2)."""
        x = self.conv(x)
        return functional.conv2d(x, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


class Attention(nn.Module):
    """Self-attention over the H·W pixels, without the residual sum."""

    def __init__(self, channels: int, num_heads: int, eps: float, init: Init, init_zero: Init) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, eps)
        self.qkv = initialised(nn.Conv2d(channels, 3 * channels, 1), init)
        self.proj = initialised(nn.Conv2d(channels, channels, 1), init_zero)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.transpose(-1, 2).unbind(3)  # (B, heads, H·W, C/heads) each
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(b, c, h, w))  # type: ignore[no-any-return]


class BlockOptions:
    """Options shared by all blocks of a network; the presets are EDM's DDPM++, NCSN++ and ADM."""

    def __init__(self, arch: str, emb_channels: int, dropout: float) -> None:
        adm = arch == "adm"
        self.emb_channels, self.dropout = emb_channels, dropout
        self.adaptive_scale = adm  # the embedding scales and shifts, or only shifts
        self.channels_per_head = 64 if adm else None  # None: one head
        self.project_resampled = not adm  # a 1x1 convolution on every resampling skip
        self.filter = (1, 3, 3, 1) if arch == "ncsnpp" else (1, 1)
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.eps = 1e-5 if adm else 1e-6
        self.init = kaiming_init(math.sqrt(1 / 3)) if adm else xavier_init()
        self.init_zero = kaiming_init(0.0) if adm else xavier_init(1e-5)
        self.init_attention = self.init if adm else xavier_init(math.sqrt(0.2))


class Block(nn.Module):
    """Residual block: norm, SiLU, resampling, convolution, embedding, norm, SiLU, dropout, convolution; then attention.

    mode: "up" or "down" to resample, or None.
    """

    kernel: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, o: BlockOptions, mode: str | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        self.options, self.mode = o, mode
        smooth = mode is not None and len(o.filter) > 2
        self.register_buffer("kernel", filter_kernel(o.filter) if smooth else None, persistent=False)
        self.norm0 = group_norm(in_channels, o.eps)
        self.conv0 = initialised(nn.Conv2d(in_channels, out_channels, 3, padding=1), o.init)
        self.affine = initialised(nn.Linear(o.emb_channels, out_channels * (2 if o.adaptive_scale else 1)), o.init)
        self.norm1 = group_norm(out_channels, o.eps)
        self.dropout = nn.Dropout(o.dropout)
        self.conv1 = initialised(nn.Conv2d(out_channels, out_channels, 3, padding=1), o.init_zero)
        self.skip: nn.Module | None = None
        if out_channels != in_channels or (mode and o.project_resampled):
            self.skip = initialised(nn.Conv2d(in_channels, out_channels, 1), o.init)
        heads = out_channels // o.channels_per_head if o.channels_per_head else 1
        self.attention = (
            Attention(out_channels, max(heads, 1), o.eps, o.init_attention, o.init_zero) if attention else None
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C_in, H, W), emb: (B, emb_channels) → (B, C_out, H', W'), H' = H, 2H or H/2 by the mode."""
        o = self.options
        h = self.conv0(resample(functional.silu(self.norm0(x)), self.mode, self.kernel))
        params = self.affine(emb)[:, :, None, None]
        if o.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = functional.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = functional.silu(self.norm1(h + params))
        h = self.conv1(self.dropout(h))
        skip = resample(x, self.mode, self.kernel)
        h = torch.add(h, self.skip(skip) if self.skip is not None else skip) * o.skip_scale
        return h if self.attention is None else (h + self.attention(h)) * o.skip_scale
