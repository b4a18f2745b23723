"""EDM's non-leaking augmentation: random geometric transforms of x0, before the blur, with labels for the network.

Source: EDM (arXiv 2206.00364), appendix F.2, after StyleGAN2-ADA (arXiv 2006.06676).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from warm_dist import rng
from warm_dist.diffusion.spectrum import exact_float32

SCALE_STD = 0.2  # of log2, isotropic and anisotropic alike
TRANSLATE_STD = 0.125  # of the image's size
ANISO_ROTATE_P = 0.5
_TAPS = 12  # of the low-pass filter between single and double resolution


class Draw(NamedTuple):
    """The transform of each image.

    labels: (B, 9) float32, all 0 for an unchanged image: x flip, y flip, log2 scale / 0.2, cos(rotation) − 1,
    sin(rotation), log2 stretch / 0.2 times cos and sin of its axis, translation / 0.125 of the width and of the height.
    matrix: (B, 3, 3) float64, from (x, y, 1) in the output, pixels from the centre, to the position in the input.
    """

    labels: NDArray[np.float32]
    matrix: NDArray[np.float64]


def draw(seed: int, positions: Sequence[int], p: float, height: int, width: int) -> Draw:
    """Draw the transforms of the images at these global positions, each kind with probability p; x flips with 1/2.

    A positive scale enlarges, a positive rotation is counter-clockwise as displayed, a positive translation is to the
    right and down. height, width: pixels.
    """
    n = len(positions)
    uniform, normal = np.empty((n, 11)), np.empty((n, 4))
    for number, generator in enumerate(rng.generators(seed, "augmentation", positions)):
        generator.random(out=uniform[number])
        generator.standard_normal(out=normal[number])
    gate, uniform = (uniform[:, :5] < p).T, uniform[:, 6:].T  # a sixth gate has no use
    x_flip, y_flip = uniform[0] < 0.5, (uniform[1] < 0.5) & gate[0]
    scale, stretch, shift = normal[:, 0] * gate[1], normal[:, 1] * gate[3], normal[:, 2:].T * gate[4]
    angle = (2 * uniform[2] - 1) * math.pi * gate[2]
    # an axis is an angle modulo π: in EDM's ±π, (−w, axis + π) has the label of (w, axis) but the inverse effect
    axis = (uniform[3] - 0.5) * math.pi * (uniform[4] < ANISO_ROTATE_P)
    # numbers one by one: NumPy's vector loops round by the processor (with AVX-512, 5 % of the powers differ)
    size, ratio = (np.array([2**x for x in SCALE_STD * log2]) for log2 in (scale, stretch))
    turn, along = _rotation(angle), _rotation(axis)
    move = _diagonal([np.ones(n)] * 2)
    move[:, :2, 2] = -shift.T * TRANSLATE_STD * (width, height)
    # the image is flipped, scaled, rotated, stretched, then translated; the inverse in reverse order
    matrix = _diagonal([1.0 - 2 * x_flip, 1.0 - 2 * y_flip]) @ _diagonal([1 / size, 1 / size]) @ turn
    matrix = matrix @ along.mT @ _diagonal([1 / ratio, ratio]) @ along @ move
    cos, sin = along[:, 0, 0], along[:, 1, 0]
    labels = [x_flip, y_flip, scale, turn[:, 0, 0] - 1, turn[:, 1, 0], stretch * cos, stretch * sin, *shift]
    return Draw(np.stack(labels, axis=1).astype(np.float32), matrix)


def _diagonal(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """diag(x, y, 1) for each x and y of two (B,) arrays: (B, 3, 3)."""
    out = np.zeros((len(values[0]), 3, 3))
    out[:, 0, 0], out[:, 1, 1], out[:, 2, 2] = values[0], values[1], 1.0
    return out


def _rotation(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) angles → (B, 3, 3), from output to input coordinates (y points down) of counter-clockwise rotations."""
    out = _diagonal([np.array([math.cos(a) for a in angle])] * 2)
    out[:, 1, 0] = [math.sin(a) for a in angle]
    out[:, 0, 1] = -out[:, 1, 0]
    return out


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Transform images by `matrix`, with reflection at the border; (B, C, H, W) float32. No host sync.

    images: (B, C, H, W) float32, at least 3 pixels high and wide. matrix: (B, 3, 3) float64 of `draw`, on their device.
    Unchanged and flipped images are bit-exact. Others are sampled bilinearly at twice the resolution, between two
    linear-phase low-pass filters (in EDM those of a wavelet).
    """
    with exact_float32():
        warped = _halve(_sample(_double(images), matrix, *images.shape[2:]))
    flips = torch.diagonal(matrix, dim1=1, dim2=2)[:, :2].sign()
    pure = ((matrix - torch.diag_embed(functional.pad(flips, (0, 1), value=1.0))).abs() < 1e-12).all(2).all(1)
    x_flip, y_flip = ((flips[:, k] < 0)[:, None, None, None] for k in (0, 1))
    flipped = torch.where(x_flip, images.flip(3), images)
    return torch.where(pure[:, None, None, None], torch.where(y_flip, flipped.flip(2), flipped), warped)


@cache
def low_pass(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A half-band sinc with a Kaiser window, (12,), symmetric, sum 1."""
    n = np.arange(_TAPS) - (_TAPS - 1) / 2
    taps = np.sinc(n / 2) * np.kaiser(_TAPS, 5.0)
    return torch.tensor(taps / taps.sum(), dtype=dtype, device=device)


def _double(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, 2H, 2W): pixel k becomes 2k and 2k + 1, with half-sample reflection at the border."""
    x = torch.cat([x[..., :3].flip(3), x, x[..., -3:].flip(3)], dim=3)
    x = torch.cat([x[..., :3, :].flip(2), x, x[..., -3:, :].flip(2)], dim=2)
    b, c, h, w = x.shape
    taps, x = 2 * low_pass(x.dtype, x.device), x.reshape(b * c, 1, h, w)  # 2: every second sample is a zero
    x = functional.conv_transpose2d(x, taps.view(1, 1, -1, 1), stride=(2, 1), padding=(_TAPS // 2 - 1, 0))
    x = functional.conv_transpose2d(x, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, _TAPS // 2 - 1))
    return x.reshape(b, c, 2 * h, 2 * w)[..., 6:-6, 6:-6]


def _sample(fine: Tensor, matrix: Tensor, height: int, width: int) -> Tensor:
    """Sample the doubled input at the pixels of the doubled output, with the margin that `_halve` needs."""
    margin = _TAPS // 2 - 1

    def centres(n: int) -> Tensor:  # in pixels from the image's centre
        return (torch.arange(-margin, 2 * n + margin, device=fine.device, dtype=matrix.dtype) + 0.5) / 2 - n / 2

    y, x = torch.meshgrid(centres(height), centres(width), indexing="ij")
    at = torch.einsum("bij,jhw->bhwi", matrix[:, :2], torch.stack([x, y, torch.ones_like(x)]))
    grid = at / torch.tensor([width / 2, height / 2], device=at.device, dtype=at.dtype)
    return functional.grid_sample(fine, grid.to(fine.dtype), "bilinear", "reflection", align_corners=False)


def _halve(x: Tensor) -> Tensor:
    """Low-pass filter and subsample: (B, C, 2H + 10, 2W + 10) → (B, C, H, W)."""
    b, c, h, w = x.shape
    taps, x = low_pass(x.dtype, x.device), x.reshape(b * c, 1, h, w)
    x = functional.conv2d(x, taps.view(1, 1, -1, 1), stride=(2, 1))
    x = functional.conv2d(x, taps.view(1, 1, 1, -1), stride=(1, 2))
    return x.reshape(b, c, *x.shape[2:])
