"""Class labels of a listing: EDM's dataset.json, cls files of WebDataset, or folders."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data_pipelines.shards.tars import MAX_LABEL, read_label
from data_pipelines.sources.listing import File, Listing, Split
from data_pipelines.sources.pictures import parts_of, plain
from warm_dist.errors import count, reason

EDM = "dataset.json"
_SAMPLED = 3  # names that a line quotes
_BUCKET_DIGITS = 5  # folders named 00000, 01000, … usually hold thousands of files each, and are no classes

Labels = tuple[list[tuple[File, int]], list[str]]
"""The files to pack, each with its label, and the names of the classes."""


class Sidecars(NamedTuple):
    """The files of a source that hold labels. read: a file's place → its bytes."""

    edm: Sequence[File]
    cls: Sequence[File]
    read: Callable[[Any], bytes]


def labelled(listing: Listing, pictures: Sequence[Split], sidecars: Sidecars) -> Labels:
    """Give each picture its class. Raises ConfigError where folders can be read in two ways, DataError for damaged labels."""
    choice = listing.choice.classes
    edm, cls = _edm_labels(listing, pictures, sidecars), list(sidecars.cls)
    if choice not in (None, "folders", "none", EDM, "cls"):
        raise listing.refuse(f"--classes {choice}: pictures have folders, none, {EDM} or cls; columns are Parquet's")
    if choice is None:
        found = [name for name, there in ((EDM, edm is not None), ("cls", bool(cls))) if there]
        if len(found) > 1:
            raise listing.refuse(f"both {EDM} and cls files hold labels; choose by --classes {EDM} or --classes cls")
        choice = found[0] if found else None
    for name, there in ((EDM, edm is not None), ("cls", bool(cls))):
        if choice == name and not there:
            raise listing.refuse(f"--classes {name}: there is none with labels")
    if choice == "cls":
        return _by_cls(listing, pictures, cls, sidecars.read)
    for file in cls:
        listing.leave("labels, by --classes", file.name)
    pictures = sorted(pictures, key=lambda split: parts_of(split.file.name))  # samples of shards stay in their order
    if choice == EDM and edm is not None:
        return _by_edm(listing, pictures, *edm)
    return _by_folders(listing, pictures, choice)


def _edm_labels(
    listing: Listing, pictures: Sequence[Split], sidecars: Sidecars
) -> tuple[int, dict[str, int] | None] | None:
    """The folders around EDM's dataset.json, and name → class (None: without classes); None if there is no such file."""
    parents = [parts_of(split.file.name)[:-1] for split in pictures]
    around = parents[0][: _common(parents)]
    chosen = None
    for file in sorted(sidecars.edm, key=lambda file: len(parts_of(file.name))):
        folder = parts_of(file.name)[:-1]
        if listing.choice.classes not in (None, EDM):
            listing.leave("labels, by --classes", file.name)
        elif chosen or folder != around[: len(folder)]:
            listing.leave(f"a {EDM} that is not the outermost around all pictures", file.name)
        else:
            chosen = file
    return _read_edm(listing, chosen, sidecars.read) if chosen else None


def _read_edm(listing: Listing, file: File, read: Callable[[Any], bytes]) -> tuple[int, dict[str, int] | None] | None:
    depth, advice = len(parts_of(file.name)) - 1, "repair it, or choose by --classes folders or --classes none"
    try:
        tree = json.loads(read(file.place), object_pairs_hook=_once)
    except (ValueError, OSError, RecursionError) as error:
        raise listing.damaged(f"{file.name} cannot be read ({reason(error)}); {advice}") from None
    if not isinstance(tree, dict) or "labels" not in tree:
        listing.leave("not EDM's, it has no 'labels'", file.name)
        return None
    if tree["labels"] is None:
        return depth, None
    labels: dict[str, int] = {}
    for pair in tree["labels"] if isinstance(tree["labels"], list) else [tree["labels"]]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise listing.damaged(
                f"{file.name}: 'labels' must be null or pairs of a name and a class, has {_short(pair)}; {advice}"
            )
        name, label = plain(pair[0]), pair[1]
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise listing.damaged(
                f"{file.name}: {name!r} has the label {_short(label)}, needs an integer from 0 to {MAX_LABEL - 1}; {advice}"
            )
        if labels.setdefault(name, label) != label:
            raise listing.damaged(f"{file.name}: {name!r} has the labels {labels[name]} and {label}; {advice}")
    return depth, labels


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return tree


def _by_edm(listing: Listing, pictures: Sequence[Split], start: int, labels: dict[str, int] | None) -> Labels:
    if labels is None:
        listing.note(f"classes: none, by {EDM}, whose labels are null")
        return [(split.file, -1) for split in pictures], []
    names = ["/".join(parts_of(split.file.name)[start:]) for split in pictures]
    missing = [name for name in names if name not in labels]
    if missing:
        ways = "complete it, leave them out by --exclude, or choose by --classes folders or --classes none"
        raise listing.damaged(
            f"{EDM} has no label for {len(missing)} of {count(len(names), 'picture')}, such as {missing[0]!r}; {ways}"
        )
    for name in sorted(labels.keys() - set(names)):
        listing.leave(f"named by {EDM}, but not there or not taken", name)
    files = [(split.file, labels[name]) for split, name in zip(pictures, names, strict=True)]
    return files, _numbers(listing, files, EDM)


def _by_cls(listing: Listing, pictures: Sequence[Split], cls: list[File], read: Callable[[Any], bytes]) -> Labels:
    """Labels of WebDataset's samples: names that are equal up to the last dot, or else up to the first."""
    found = {file.name[: -len(".cls")]: file for file in cls}
    out, owners = [], dict[str, str]()
    for split in pictures:
        name = split.file.name
        folder, slash, base = name.rpartition("/")
        stems = (name.rpartition(".")[0], folder + slash + base.partition(".")[0])
        stem = next((stem for stem in stems if stem in found), None)
        if stem is None:
            raise listing.damaged(f"{name!r} has no cls member, others have; or choose by --classes none")
        if stem in owners:
            pair = f"{owners[stem]!r} and {name!r}"
            raise listing.refuse(f"two pictures of one sample, {pair}; choose by --include or --exclude")
        owners[stem] = name
        out.append((split.file, read_label(read(found[stem].place), f"{listing.where}: {found[stem].name!r}")))
    for stem in sorted(found.keys() - owners.keys()):
        listing.leave("labels without a picture", found[stem].name)
    return out, _numbers(listing, out, "cls files")


def _by_folders(listing: Listing, pictures: Sequence[Split], choice: str | None) -> Labels:
    parents = [split.parts[:-1] for split in pictures]
    if choice == "folders":  # pictures beside the class folders have no class
        inside = [parent for parent in parents if parent]
        if not inside:
            raise listing.refuse("--classes folders: no picture is in a folder; leave it out, or say --classes none")
        depth = min(_common(inside), max(map(len, inside)) - 1)
        stray = [split for split in pictures if len(split.parts) < depth + 2]
        for split in stray:
            listing.leave("in no class folder", split.file.name)
        return _folder_labels(listing, [split for split in pictures if len(split.parts) >= depth + 2], depth)
    depth = _common(parents)
    lengths = {len(parent) - depth for parent in parents}
    if lengths == {0} and listing.tables and choice is None:
        ways = "--classes none takes no classes; class folders or EDM's dataset.json are read"
        raise listing.refuse(f"{listing.tables[0]!r} may hold labels, but is not read; {ways}")
    if choice == "none" or lengths == {0}:
        listing.note(f"classes: none, {'by --classes none' if choice else 'the pictures are in one folder'}")
        return [(split.file, -1) for split in pictures], []
    beside = [split.file.name for split in pictures if len(split.parts) == depth + 1]
    ways = "--classes folders takes the folders {}, --classes none takes no classes"
    folders = _names(sorted({parent[depth] for parent in parents if len(parent) > depth}))
    if beside:
        out = f"{ways.format(f'{folders} and leaves such pictures out')}, --exclude leaves out what you name"
        raise listing.refuse(
            f"{len(beside)} of {len(pictures)} pictures are in no class folder, such as {beside[0]!r}; {out}"
        )
    if lengths != {1}:
        deep = next(split.file.name for split in pictures if len(split.parts) > depth + 2)
        raise listing.refuse(f"folders in folders, such as {deep!r}; {ways.format(folders)}")
    names = {parent[depth] for parent in parents}
    if all(name.isdigit() and len(name) >= _BUCKET_DIGITS for name in names):
        raise listing.refuse(
            f"the folders {folders} may be classes, or only hold thousands each; {ways.format(folders)}"
        )
    alike: dict[str, str] = {}
    for name in sorted(names):
        key = unicodedata.normalize("NFKC", name).casefold().strip()
        if (other := alike.setdefault(key, name)) != name:
            raise listing.refuse(
                f"the folders {other!a} and {name!a} may be one class; rename one, or {ways.format(folders)}"
            )
    return _folder_labels(listing, pictures, depth)


def _folder_labels(listing: Listing, pictures: Sequence[Split], depth: int) -> Labels:
    names = sorted({split.parts[depth] for split in pictures})
    numbers = {name: number for number, name in enumerate(names)}
    listing.note(f"classes: {len(names)}, the folders {_names(names)}")
    return [(split.file, numbers[split.parts[depth]]) for split in pictures], names


def _common(parents: Sequence[tuple[str, ...]]) -> int:
    """The number of folders around everything."""
    first, last = min(parents, default=()), max(parents, default=())
    return next(
        (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
        min(len(first), len(last)),
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SAMPLED])) + (f", … {names[-1]!r}" if len(names) > _SAMPLED else "")


def _numbers(listing: Listing, files: Sequence[tuple[File, int]], source: str) -> list[str]:
    """The names of numbered classes."""
    found = {label for _, label in files}
    total = max(found) + 1
    empty = f", {total - len(found)} of them without a picture" if len(found) < total else ""
    listing.note(f"classes: {total}, by {source}{empty}")
    return [str(number) for number in range(total)]


def _short(value: object) -> str:
    return repr(value)[:60]
