"""Opens the source that a user names."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.shards.payload import MAX_SIDE
from data_pipelines.sources.base import Source
from data_pipelines.sources.builtin import open_digits, open_openmoji
from data_pipelines.sources.folder import open_folder, walk
from data_pipelines.sources.listing import Choice, File, Listing
from data_pipelines.sources.pictures import PICTURE, kind_of, suffix_of
from data_pipelines.sources.transform import MAX_BYTES, RESIZE, Transform
from warm_dist.errors import ConfigError, count

_SHARDS = (".parquet", ".tar")
_KNOWN = "'openmoji', 'digits', a folder of images, a .zip, .tar or .parquet file, or CIFAR's .tar.gz"


def open_source(
    spec: str,
    resolution: int,
    resize: str = "box",
    shuffle: bool = False,
    *,
    choice: Choice = Choice(),  # noqa: B008  # immutable
    max_bytes: int = MAX_BYTES,
    output: Path | None = None,
) -> Source:
    """Open a source of images (resolution, resolution, C) uint8.

    spec: "openmoji", "digits", a folder of images, a .zip or .tar of one, a .parquet file, a folder of .parquet or .tar
    files, or CIFAR's .tar.gz (its training images). resize: see `transform.decode_image`. If all images of a folder, zip
    or tar are in class folders, the sorted folder names are the classes; cls members and EDM's dataset.json take precedence.
    shuffle: use a fixed pseudo-random order. choice: what decides where two readings are plausible. max_bytes: the most
    that decoding one image may take. output: a folder whose packed data are no source. Raises ConfigError for an unknown
    source, two plausible readings, or an option it does not support, DataError for an archive that cannot be read.
    """
    if not 1 <= resolution <= MAX_SIDE or resize not in RESIZE:
        needed = f"1 to {MAX_SIDE}, and one of {', '.join(RESIZE)}"
        raise ConfigError(f"resolution {resolution}, resize {resize!r}: needs {needed}")
    transform, path = Transform(resolution, resize, max_bytes), Path(spec).expanduser()
    listing = Listing(spec, choice)
    if spec in ("openmoji", "digits"):
        source = _plain(listing, (open_openmoji if spec == "openmoji" else open_digits)(transform))
    elif path.is_dir():
        source = _open_folder(path, listing, transform, output)
    elif path.is_file():
        source = _open_file(path, listing, transform)
    else:
        remote = "; copy it to a folder first, or" if "://" in spec else ";"
        raise ConfigError(f"{listing.where}: no such source{remote} give {_KNOWN}")
    if not shuffle:
        return source
    if source.shuffled is None:
        raise ConfigError(f"{listing.where}: can only be read in its own order; leave out --shuffle")
    return source.shuffled()


def _plain(listing: Listing, source: Source) -> Source:
    if listing.choice != Choice():
        raise listing.refuse("is read in one way only; leave out --classes, --split, --include and --exclude")
    return source


def _open_file(path: Path, listing: Listing, transform: Transform) -> Source:
    from data_pipelines.sources import archives, cifar, parquet

    name = path.name.lower()
    if name.endswith(".parquet"):
        return parquet.open_tables(path.parent, [File(path.name, 0, path.name)], listing, transform)
    if name.endswith(".zip"):
        return archives.open_zip(path, listing, transform)
    if name.endswith(".tar"):
        return archives.open_tars([path], listing, transform)
    if name.endswith((".tar.gz", ".tgz")):
        return _plain(listing, cifar.open_cifar(path, transform))
    raise ConfigError(f"{listing.where}: a file of a kind that is not read; give {_KNOWN}")


def _open_folder(path: Path, listing: Listing, transform: Transform, output: Path | None) -> Source:
    """Tables, shards or pictures, whatever the folder holds; refused if it holds two of them."""
    from data_pipelines.sources import archives, parquet

    files = walk(path, listing, output)
    if not any(suffix_of(file.name) in _SHARDS for file in files):
        return open_folder(path, files, listing, transform)
    inside = listing.choice.inside(files)
    listing.choice = listing.choice.without(inside)
    kinds: dict[str, list[File]] = {}
    for file in listing.wanted(files):
        suffix = suffix_of(file.name)
        if suffix in _SHARDS or kind_of(file.name) == PICTURE:
            kinds.setdefault(suffix if suffix in _SHARDS else "picture", []).append(file)
        else:
            listing.leave(kind_of(file.name) or "no pictures", file.name)
    if len(kinds) > 1:
        suffix = min(kinds)  # of the shards: a dot sorts before letters
        held = " and ".join(count(len(found), f"{kind} file".lstrip()) for kind, found in sorted(kinds.items()))
        raise listing.refuse(
            f"holds {held}; --include '*{suffix}' takes the former, --exclude '*{suffix}' leaves it out"
        )
    if ".parquet" in kinds:
        return parquet.open_tables(path, kinds[".parquet"], listing, transform)
    if ".tar" in kinds:
        tars = [split.file for split in listing.of_split(kinds[".tar"], shards=True, inside=True)]
        listing.choice = inside if len(tars) == len(kinds[".tar"]) else inside._replace(split="none")
        return archives.open_tars([path / file.name for file in tars], listing, transform)
    return open_folder(path, kinds.get("picture", []), listing, transform)
