"""Extractors: they do not depend on the batch, and are what they are called, against the packages they stand for."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.support.memory_store import MemoryStore
from warm_dist.errors import ConfigError, DataError
from warm_dist.evaluation import efficientnet_lite0 as lite0_network
from warm_dist.evaluation.extractors import Lite0, Pixels, make_extractor
from warm_dist.evaluation.feature_stream import features
from warm_dist.files import file_sha256


def noise(n: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def saved(network: nn.Module, path: Path) -> tuple[str, str]:
    """The network as TorchScript at `path`: (path, sha256)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; FID's own weights are TorchScript
        torch.jit.script(network.eval()).save(str(path))
    return str(path), file_sha256(path)


def test_pixels_are_block_means_of_the_luminance() -> None:
    images = noise(3, 16)
    out = features(make_extractor("pixels"), images, batch_size=2)
    luminance = np.tensordot([0.299, 0.587, 0.114], images.astype(float), axes=(0, 1))
    assert np.allclose(out, luminance.reshape(3, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(3, 64), rtol=1e-5)
    grey = np.repeat(images[:, :1], 3, axis=1)
    assert np.array_equal(features(Pixels(), images[:, :1], batch_size=3), features(Pixels(), grey, batch_size=3))


def test_what_cannot_be_extracted_is_refused() -> None:
    """Fault: pixels in [-1, 1] are taken for 0..255, or a setting that the extractor lacks is ignored."""
    with pytest.raises(ValueError, match="needs uint8"):
        features(Pixels(), np.zeros((2, 3, 8, 8), np.float32), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'vgg': needs to be lite0, pixels, inception or torchscript"):
        make_extractor("vgg")
    for name in ("inception", "torchscript"):
        with pytest.raises(ConfigError, match="extractor_sha256 None; it needs both"):
            make_extractor(name, url="weights.pt")
    with pytest.raises(ConfigError, match="pixels has only float32"):
        make_extractor("pixels", bf16=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_name_their_extractor(value: float) -> None:
    class Sick(Pixels):
        name = "sick"

        def __call__(self, images: torch.Tensor) -> NDArray[np.float32]:
            out = super().__call__(images)
            out[:, -1] = np.where(images[:, 0, 0, 0].numpy() == 0, value, out[:, -1])
            return out

    images = noise(5, 8) | 1
    assert np.array_equal(features(Sick(), images, 3), features(Pixels(), images, 3))
    images[4] = 0
    with pytest.raises(DataError, match="sick gives features that are not finite for 1 of 2 images"):
        features(Sick(), images, 3)


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0()


def test_lite0_does_not_depend_on_the_batch(lite0: Lite0) -> None:
    images = noise(9, 16)
    out = features(lite0, images, batch_size=9)
    assert out.shape == (9, 1280)
    assert out.dtype == np.float32
    assert np.array_equal(out, features(lite0, images, batch_size=9))
    assert np.allclose(out, features(lite0, images, batch_size=1), atol=1e-4)  # features reach 5; kernels may differ
    half = make_extractor("lite0", bf16=True)
    error = np.linalg.norm(features(half, images, batch_size=9) - out) / np.linalg.norm(out)
    assert half.name == "lite0-bf16"
    assert 1e-4 < error < 0.1  # of noise
    assert np.abs(out[0] - out[1]).max() > 0.1
    grey = np.repeat(images[:2, :1], 3, axis=1)
    assert np.array_equal(features(lite0, images[:2, :1], 2), features(lite0, grey, 2))


def test_lite0_is_the_package_network_on_the_published_input(lite0: Lite0) -> None:
    """Folding, padding and layout change rounding only; the package's own forward is the oracle."""
    path = lite0_network.weights_file()
    assert lite0.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    images = torch.from_numpy(noise(2, 224, seed=1))
    network = lite0_network.network(path)
    with torch.inference_mode():
        expected = network.extract_features((images.float() - 127) / 128).mean(dim=(2, 3)).numpy()
    assert np.allclose(features(lite0, images, 2), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.5


class Layers(nn.Module):
    """Stands in for Inception's layers: (B, 3, 299, 299) to (B, 2048, 1, 1), sensitive to place and channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, (26, 26)).flatten(1)
        return x[:, :2028].reshape(-1, 2028, 1, 1).repeat(1, 2, 1, 1)[:, :2048]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def clean_fid(folder: Path, images: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.float32]:
    """Features by clean-fid's own resize, layout, batch and network, from `inception-2015-12-05.pt` in this folder."""
    from launch.benchmarks.peers.clean_fid import CleanFid

    return CleanFid(folder)(torch.as_tensor(images))


def test_inception_is_clean_fids_own_arithmetic(tmp_path: Path) -> None:
    path = saved(Weights(), tmp_path / "inception-2015-12-05.pt")
    images = noise(2, 40)
    ours = features(make_extractor("inception", *path), images, batch_size=2)
    assert np.abs(ours - clean_fid(tmp_path, images)).max() < 1e-6  # a mean is summed in the layout's order
    assert np.abs(ours[0] - ours[1]).max() > 0.1


class Small(nn.Module):
    """A user's network that resizes and normalizes by itself. pooled: gives (B, 12, 1, 1) instead of (B, 12)."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pooled = nn.Conv2d(3, 12, 5, stride=2), pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) / 127.5 - 1
        x = self.conv(x).relu().mean(dim=(2, 3), keepdim=True)
        return x if self.pooled else x.flatten(1)


@pytest.mark.parametrize("pooled", [False, True])
def test_any_torchscript_by_path_and_sha256(pooled: bool, tmp_path: Path) -> None:
    """Fault: the images are resized or normalized before a network that does so itself."""
    source = saved(Small(pooled), tmp_path / "small.pt")
    extractor = make_extractor("torchscript", *source, resolution=24)
    assert (extractor.name, extractor.sha256, extractor.num_features) == ("torchscript", source[1], 12)
    assert extractor.resize == "the network's own"
    images = noise(7, 24)
    with torch.inference_mode():
        expected = Small(pooled)(torch.from_numpy(images).float()).flatten(1).numpy()
    assert np.allclose(features(extractor, images, 3), expected, atol=1e-6)
    rough = make_extractor("torchscript", *source, bf16=True, resolution=24)
    assert rough.name == "torchscript-bf16"
    error = np.abs(features(rough, images, 3) - expected).max()
    assert 0 < error < 0.02 * np.abs(expected).max()  # bf16 has 8 bits


def test_torchscript_from_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the weights are downloaded again at every start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, sha256 = saved(Small(), tmp_path / "small.pt")
    store = MemoryStore({"small.pt": Path(path).read_bytes()})
    monkeypatch.setattr("warm_dist.store.download.open_store", store.open)
    for _ in range(2):
        extractor = make_extractor("torchscript", "s3://bucket/weights/small.pt", sha256)
    assert extractor.num_features == 12
    assert store.downloads == 1


class Wrong(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "map":
            return x
        if self.kind == "one vector":
            return x.mean(dim=(0, 2, 3))
        if self.kind == "integers":
            return x.mean(dim=(2, 3)).long()
        return x.reshape(1, 299 * 299 * 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("map", r"gives \(1, 3, 24, 24\) torch.float32 for one image, needs \(1, D\)"),
        ("one vector", r"gives \(3,\) torch.float32 for one image"),
        ("integers", r"gives \(1, 3\) torch.int64 for one image, needs \(1, D\) or \(1, D, 1, 1\) of floats"),
        ("fixed size", r"does not take \(1, 3, 24, 24\) float32 in 0..255: .*shape"),
    ],
)
def test_torchscript_of_another_contract(kind: str, message: str, tmp_path: Path) -> None:
    """Fault: a network whose output is not one row of floats is noticed only in the first evaluation."""
    with pytest.raises(ConfigError, match=message):
        make_extractor("torchscript", *saved(Wrong(kind), tmp_path / "wrong.pt"), resolution=24)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(0, 2, 3)).unsqueeze(0)


def test_torchscript_that_gives_no_row_an_image(tmp_path: Path) -> None:
    """Fault: a network that mixes the images of a batch is accepted, since one image passes the check."""
    with pytest.raises(ConfigError, match="gives tuple for one image"):
        make_extractor("torchscript", *saved(Pair(), tmp_path / "pair.pt"))
    extractor = make_extractor("torchscript", *saved(Mixer(), tmp_path / "mixer.pt"))  # right for one image
    with pytest.raises(DataError, match="must treat every image alone"):
        features(extractor, noise(3, 64), 3)


@pytest.mark.parametrize("name", ["inception", "torchscript"])
def test_what_is_no_torchscript_or_not_the_right_one(name: str, tmp_path: Path) -> None:
    """Fault: a file of another kind ends in torch's own exception, or is loaded before its sha256 is compared."""
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    with pytest.raises(ConfigError, match=r"torch\.jit\.load refuses it"):
        make_extractor(name, str(text), file_sha256(text))
    state: dict[str, Any] = {"weight": torch.zeros(3)}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"torch\.jit\.load refuses it"):
        make_extractor(name, str(tmp_path / "state.pt"), file_sha256(tmp_path / "state.pt"))
    with pytest.raises(DataError, match="nothing of it was loaded"):
        make_extractor(name, str(text), "0" * 64)


def test_inception_needs_layers(tmp_path: Path) -> None:
    """Fault: other TorchScript weights under the name inception end in an AttributeError."""
    with pytest.raises(ConfigError, match="a TorchScript without `layers`; use"):
        make_extractor("inception", *saved(Small(), tmp_path / "small.pt"))
