"""What a network computes in: bfloat16 between its float32 inputs and outputs, or float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def set_precision(network: nn.Module, precision: str) -> None:
    """Have a UNet compute in "fp32" or "bf16", whatever its parameters are."""
    network.dtype = DTYPES[precision]  # type: ignore[assignment]  # see UNet


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels for a GPU compute with this tensor; `networks.memory` plans for another device than its own."""
    return x.is_cuda


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself: an emulation would be slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
