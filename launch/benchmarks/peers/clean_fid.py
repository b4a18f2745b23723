"""clean-fid's own way to Inception's features, for images in memory: its resize, its network, its batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from cleanfid.fid import get_batch_features
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from numpy.typing import NDArray
from torchvision.transforms.functional import to_tensor

BATCH = 32  # the default of its compute_fid


class CleanFid:
    """folder: where `inception-2015-12-05.pt` lies."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated
            self.network = InceptionV3W(str(folder), download=False)
        self.resize = build_resizer("clean")

    def __call__(self, images: torch.Tensor) -> NDArray[np.float32]:
        """images: (N, 3, H, W) uint8. Returns (N, 2048). to_tensor lays images out as its ResizeDataset does."""
        pixels = images.permute(0, 2, 3, 1).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its `mode` to PIL's fromarray
            parts = [
                get_batch_features(
                    torch.stack([to_tensor(self.resize(image)) for image in part]), self.network, torch.device("cpu")
                )
                for part in (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
            ]
        return np.concatenate(parts)
