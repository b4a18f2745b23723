"""placeholder"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
    if before is not None:
        x = x + before[:, :, None, None]
    x = functional.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        x = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None] + 1)
    return functional.silu(x) if silu else x
