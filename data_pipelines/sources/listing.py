"""What is taken of a source and why, and what is left out, by reason; refuses where two readings are plausible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, NamedTuple

from data_pipelines.sources.pictures import PICTURE, is_hidden, kind_of, looks_like_a_picture, parts_of, suffix_of
from warm_dist.errors import ConfigError, DataError, printable

SPLITS = ("train", "validation", "test")
_WORDS = {word: split for split, words in zip(SPLITS, ("train training", "validation valid val dev", "test testing eval"),
          strict=True) for word in words.split()}  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(sets?|[ab])?(?![a-z])")
_TABLE = re.compile(r"(metadata|dataset|(.*[-_.])?(labels?|annotations?|classes))\.(csv|tsv|jsonl?|txt|mat|xml)")
_PIECE = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)")
_MASK = r"masks?|annotations?|annot?s?|annos?|trimaps?|segmentations?|mattes?|ground[-_. ]?truths?"
_MASK_FOLDER = re.compile(
    rf"(.*[-_. ])?({_MASK})([-_. ].*|\d*)|(.*[-_. ])?(labels?|segs?|gt|gtfine|gtcoarse|depths?([-_. ]?maps?)?|alphas?|thumb(nail)?s?|segmentation(class|object)(aug)?)"
)
_MASK_FILE = re.compile(rf"(.+)[-_. ]({_MASK}|labels?|seg|gt|depth|alpha)|({_MASK}|label|seg|gt|depth|alpha)[-_. ](.+)")
_BARE = "without suffix"
_PHOTO = ["rgb", "color", "colour", "image", "img", "photo", "input"]


class Choice(NamedTuple):
    """What flags decide about a source; None and () leave it to what is plain.

    classes: "folders", "none", "dataset.json", "cls", or a column of Parquet. split: one of SPLITS, "all" (merged), or
    "none" (no name here is that of a split). include, exclude: patterns of names, in which * also matches slashes.
    """

    classes: str | None = None
    split: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def inside(self, files: Sequence[File]) -> Choice:
        """What decides within shards: patterns that match no file, and *."""
        include, exclude = (
            tuple(
                pattern
                for pattern in patterns
                if pattern == "*" or not any(_matches(file.name, [pattern]) for file in files)
            )
            for patterns in (self.include, self.exclude)
        )
        return self._replace(include=include, exclude=exclude)

    def without(self, inside: Choice) -> Choice:
        """What decides between files: the patterns that are not for within."""
        include, exclude = (
            tuple(pattern for pattern in ours if pattern == "*" or pattern not in theirs)
            for ours, theirs in ((self.include, inside.include), (self.exclude, inside.exclude))
        )
        return self._replace(include=include, exclude=exclude)


class File(NamedTuple):
    """A file of a source. name: its path, with slashes. content: changes with the file. place: for the source's reader."""

    name: str
    content: object
    place: Any


class Split(NamedTuple):
    """A file with the parts of its name, without the folder that names its split."""

    file: File
    parts: tuple[str, ...]


class Listing:
    """The account of one source's listing. where: the source's name for people."""

    def __init__(self, where: str, choice: Choice) -> None:
        self.where, self.choice = printable(where), choice
        self.notes: list[str] = []
        self.tables: list[str] = []  # that may hold labels, but are not read
        self._left: dict[str, Counter[str]] = {}
        self._example: dict[str, str] = {}

    def leave(self, reason: str, name: str) -> None:
        """Count a file that is left out."""
        self._left.setdefault(reason, Counter())[suffix_of(name) or _BARE] += 1
        self._example.setdefault(reason, name)

    def note(self, line: str) -> None:
        """Tell what was taken for classes, splits or images, and why."""
        self.notes.append(printable(line))

    def told(self) -> tuple[str, ...]:
        """What was taken, then what was left out, in printable lines."""
        left = []
        for reason, suffixes in self._left.items():
            kinds = ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common(5))
            such = ("" if {*suffixes} == {_BARE} else f"{kinds}; ") + f"such as {self._example[reason]!r}"
            left.append(printable(f"left out: {reason}: {suffixes.total()} ({such})"))
        return (*self.notes, *left)

    def refuse(self, text: str) -> ConfigError:
        """The error for a source with two plausible readings, or for a flag that does not fit it."""
        return ConfigError(printable(f"{self.where}: {text}"))

    def damaged(self, text: str) -> DataError:
        """The error for files that contradict each other or cannot be read."""
        return DataError(printable(f"{self.where}: {text}"))

    def empty(self) -> DataError:
        """The error for a source without images."""
        return self.damaged(f"no images; {'; '.join(self.told()) or 'it is empty'}")

    def wanted(self, files: Iterable[File]) -> list[File]:
        """The files that are neither hidden nor excluded. Raises DataError for two pictures or labels of one name."""
        out: dict[str, File] = {}
        for file in files:
            if is_hidden(file.name):
                self.leave("hidden or a system's own", file.name)
            elif (self.choice.include and not _matches(file.name, self.choice.include)) or _matches(
                file.name, self.choice.exclude
            ):
                self.leave("by --include and --exclude", file.name)
            elif file.name in out and kind_of(file.name) != PICTURE and suffix_of(file.name) != ".cls":
                self.leave("of a name that occurs twice", file.name)
            elif file.name in out:
                raise self.damaged(f"the file {file.name[:80]!r} occurs twice; leave one out")
            else:
                out[file.name] = file
        return list(out.values())

    def pictures(self, files: Iterable[File], head: Callable[[Any], bytes]) -> list[File]:
        """The pictures among `files`, by suffix, else by content."""
        out = []
        for file in files:
            kind = kind_of(file.name) or (PICTURE if looks_like_a_picture(head(file.place)) else "no pictures")
            if kind == PICTURE:
                out.append(file)
            else:
                self.leave(kind, file.name)
                if _TABLE.fullmatch(file.name.rpartition("/")[2].lower()):
                    self.tables.append(file.name)
        return out

    def complete(self, files: Sequence[File]) -> None:
        """Raises DataError if pieces of a table, NAME-00000-of-00002, are missing, unless --include names what to take."""
        found: dict[tuple[str, str, str], set[int]] = {}
        for file in files:
            if match := _PIECE.fullmatch(file.name):
                found.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
        for (name, total, suffix), numbers in found.items():
            missing = sorted(set(range(int(total))) - numbers)
            if missing and not self.choice.include:
                such = f"{name}-{missing[0]:05d}-of-{total}{suffix}"
                ways = "complete them, or take what is there by --include '*'"
                raise self.damaged(f"{len(missing)} of {int(total)} pieces are missing, such as {such!r}; {ways}")

    def of_split(self, files: Sequence[File], shards: bool = False, inside: bool = False) -> list[Split]:
        """The files of the chosen split. shards: those without a split's name are another split; else they may be classes.

        inside: if no file's name speaks of a split, names inside of them may.

        Raises ConfigError if names speak of several splits, or a folder beside others has the name of one, and no flag
        decides, or if none is of the one asked for.
        """
        wanted = self.choice.split
        whole = [Split(file, parts_of(file.name)) for file in files]
        if wanted == "none":
            return whole
        places = [_split_at(split.parts) for split in whole]
        kinds = Counter(place[1] if place else None for place in places)
        named = {kind for kind in kinds if kind}
        exact = {place[1] for place in places if place and place[2]}  # a class may be named train
        several = len(kinds) > 1 and (bool(exact - {"train"}) or None not in kinds or (shards and bool(named)))
        if not several and (wanted in (None, "all") or (inside and not named)):
            return whole
        order = [kind for kind in (*SPLITS, None) if kind in kinds]
        found = ", ".join(f"{kinds[kind]} of {kind or 'no split'}" for kind in order)
        if wanted is None:
            ways = f"--split {order[0]} takes one, --split all merges them, --split none says that these names mean no split"
            speak = "several splits" if len(named) > 1 else "a split, others do not"
            raise self.refuse(f"names speak of {speak} ({found}); {ways}")
        out = []
        for split, place in zip(whole, places, strict=True):
            if wanted != "all" and (place is None or place[1] != wanted):
                self.leave(f"not of the split {wanted}", split.file.name)
            elif place and place[0] < len(split.parts) - 1:
                out.append(Split(split.file, split.parts[: place[0]] + split.parts[place[0] + 1 :]))
            else:
                out.append(split)
        if not out:
            raise self.refuse(f"--split {wanted}: no name speaks of it ({found or 'no files'})")
        self.note(f"split: {wanted}, by --split ({found})")
        return out

    def without_masks(self, pictures: Sequence[File]) -> None:
        """Raises ConfigError if some of the pictures are masks of others by their names, unless --include names what to take."""
        if self.choice.include:
            return
        stems: dict[str, str] = {}
        for file in pictures:
            if (other := stems.setdefault(_stem(file.name), file.name)) != file.name:
                ways = "leave one out by --exclude, or take everything by --include '*'"
                raise self.refuse(
                    f"two pictures of one name, {other!r} and {file.name!r}, of which one may be a mask; {ways}"
                )
        masks = {file.name: pattern for file in pictures if (pattern := _mask_pattern(file.name, stems))}
        if masks and len(masks) < len(pictures):
            name, pattern = next(iter(masks.items()))
            ways = f"leave them out, by --exclude {pattern!r} or the like, or take everything by --include '*'"
            raise self.refuse(f"{len(masks)} of {len(pictures)} pictures seem to be masks, such as {name!r}; {ways}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _split_at(parts: Sequence[str]) -> tuple[int, str, bool] | None:
    """(part, split, whether the part says nothing else) of the first part of a name that speaks of a split."""
    for at, part in enumerate(parts):
        if found := _WORD.search(part.lower()):
            rest = part.lower().replace(found[0], "", 1)
            return at, _WORDS[found[1]], at < len(parts) - 1 and not re.search("[a-z]", rest)
    return None


def _stem(name: str) -> str:
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix else name


def _mask_pattern(name: str, stems: Container[str]) -> str:
    """The pattern that leaves out a mask and its like, "" for a picture that is no mask by its name."""
    *folders, base = name.split("/")
    for at, folder in enumerate(folders):
        if _MASK_FOLDER.fullmatch(folder.lower()):
            return escape("/".join(folders[: at + 1])) + "/*"
    stem = _stem(base)
    found = _MASK_FILE.fullmatch(stem.lower())
    if not found:
        return ""
    rest = stem[: len(found[1])] if found[1] else stem[-len(found[4]) :]
    photos = [
        rest,
        *(name for word in _PHOTO for mark in "-_. " for name in (f"{rest}{mark}{word}", f"{word}{mark}{rest}")),
    ]
    if not any("/".join([*folders, photo]) in stems for photo in photos):
        return ""
    return (
        f"*{escape(base[len(rest) :])}"
        if found[1]
        else "/".join([*map(escape, folders), f"{escape(stem[: -len(rest)])}*"])
    )
