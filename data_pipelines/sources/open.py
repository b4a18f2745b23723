"""Opens the source that a user names."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.sources.base import Source
from data_pipelines.sources.builtin import open_digits, open_openmoji
from data_pipelines.sources.folder import open_folder
from data_pipelines.sources.transform import RESIZE, Transform
from warm_dist.errors import ConfigError


def open_source(spec: str, resolution: int, resize: str = "box", shuffle: bool = False) -> Source:
    """Open a source of images (resolution, resolution, C) uint8.

    spec: "openmoji", "digits", a folder of images, a .zip or .tar of one, a .parquet file, a folder of .parquet or .tar
    files, or CIFAR's .tar.gz (its training images). resize: see `transform.decode_image`. If all images of a folder, zip
    or tar are in class folders, the sorted folder names are the classes; cls members of a tar take precedence.
    shuffle: use a fixed pseudo-random order. Raises ConfigError for an unknown source or an option it does not support,
    DataError for an archive that cannot be read.
    """
    from data_pipelines.sources import archives, cifar, parquet

    if resolution < 1 or resize not in RESIZE:
        raise ConfigError(f"resolution {resolution}, resize {resize!r}: needs >= 1, and one of {', '.join(RESIZE)}")
    transform, path = Transform(resolution, resize), Path(spec)
    if spec in ("openmoji", "digits"):
        source = (open_openmoji if spec == "openmoji" else open_digits)(transform)
    elif path.is_dir():
        tables, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
        if tables:
            source = parquet.open_tables(tables, transform)
        else:
            source = archives.open_tars(tars, transform) if tars else open_folder(path, transform)
    elif path.is_file() and spec.lower().endswith((".parquet", ".zip", ".tar", ".tar.gz", ".tgz")):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            source = parquet.open_tables([path], transform)
        elif suffix == ".zip":
            source = archives.open_zip(path, transform)
        else:
            source = archives.open_tars([path], transform) if suffix == ".tar" else cifar.open_cifar(path, transform)
    else:
        known = "'openmoji', 'digits', a folder of images, a .zip, .tar or .parquet file, or CIFAR's .tar.gz"
        raise ConfigError(f"{spec}: no such source; give {known}")
    if not shuffle:
        return source
    if source.shuffled is None:
        raise ConfigError(f"{spec}: can only be read in its own order; leave out --shuffle")
    return source.shuffled()
