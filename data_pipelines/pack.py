"""Pack images into WebDataset shards with a manifest, on S3 or in a folder.

`python -m data_pipelines.pack SOURCE OUT_URL --resolution 64`. SOURCE: openmoji, digits, a folder of images (class
folders become labels), a .zip or .tar of one, a .parquet file or a folder of those or of .tar shards, CIFAR's .tar.gz.
It tells what it takes for images, classes and split and what it leaves out, and asks for a flag where two readings are
plausible. The same source gives the same bytes for any number of processes and machines. If it is killed, the same
command continues.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.pack_arguments import RAW_UP_TO, parse
from data_pipelines.shards import packing_record
from data_pipelines.shards.indexed import Indexed, index_shard, merge
from data_pipelines.shards.manifest import NAME, Manifest, read_manifest, write_manifest
from data_pipelines.shards.names import BAD, LISTING, PARTS, SHARD
from data_pipelines.shards.owner import owned
from data_pipelines.shards.packing_record import Part
from data_pipelines.shards.payload import PAYLOADS, encode
from data_pipelines.shards.process_pool import in_processes, shared_store
from data_pipelines.sources.base import BadImage, Item, Sample, Source
from data_pipelines.sources.listing import Choice
from data_pipelines.sources.open import open_source
from warm_dist.errors import ConfigError, DataError, OutputError, count, printable, run, writing
from warm_dist.store.base import Store
from warm_dist.store.open import open_store


class _Shard(NamedTuple):
    """A shard to write. first: index of its first image in the source."""

    number: int
    first: int
    items: Iterable[Item]


class _Output(NamedTuple):
    url: str
    endpoint_url: str | None
    recipe: str
    resolution: int | None
    payload: str | None


def pack(source: Source, out_url: str, endpoint_url: str | None = None, workers: int = 1, **options: Any) -> Manifest:
    """Pack a source and return its manifest; see `Packing` for the options, `Packing.run` for workers."""
    packing = Packing(source, out_url, endpoint_url, **options)
    packing.run(workers=workers)
    return packing.finish()


class Packing:
    """Packs a source below `out_url`: `run` writes the missing shards, `finish` the manifest.

    resolution: required of the images, pixels (None: any). payload: one of PAYLOADS (None: npy up to 64 px, else png).
    max_bad: largest fraction of undecodable images, which are left out and listed in bad_images.json and on stderr.
    Shards are named by content and the manifest is written last, so an earlier data set in the same folder stays readable
    until then; its other shards are deleted afterwards. An interrupted packing continues with the same arguments.
    Raises DataError for an empty source, ConfigError for an impossible option. Both `run` and `finish` raise OutputError
    while another packing writes to the same folder; parts of one packing share it.
    """

    def __init__(
        self,
        source: Source,
        out_url: str,
        endpoint_url: str | None = None,
        resolution: int | None = None,
        shard_size: int = 1024,
        payload: str | None = None,
        max_bad: float = 0.0,
    ) -> None:
        if shard_size < 1 or payload not in (None, *PAYLOADS) or not 0 <= max_bad < 1:
            given = f"shard_size {shard_size}, payload {payload!r}, max_bad {max_bad}"
            raise ConfigError(f"{given}: need >= 1, one of {PAYLOADS}, [0, 1)")
        if not len(source):
            raise DataError("the source has no images")
        self.source, self.shard_size, self.max_bad = source, shard_size, max_bad
        self.store, self.endpoint_url = open_store(out_url, endpoint_url), endpoint_url
        self.num_shards = -(-len(source) // shard_size)
        # everything that a shard's bytes depend on
        facts = (source.identity, len(source), source.class_names, resolution, shard_size, payload, version("pillow"))
        recipe = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        self.output = _Output(out_url, endpoint_url, recipe, resolution, payload)
        self._names: dict[int, str] = {}  # number → name of the shards that are known to be stored

    def run(
        self, part: tuple[int, int] = (1, 1), workers: int = 1, progress: Callable[[int], object] = lambda count: None
    ) -> int:
        """Write the missing shards of part (i, n), and return how many shards of all parts are still missing.

        workers: processes; more than one needs a source whose parts can be pickled. progress: called with the number of
        images of each finished shard. Raises ConfigError for an impossible part or image size, and what the store raises.
        """
        share, shares = part
        if not 1 <= share <= shares:
            raise ConfigError(f"part {share}/{shares}: needs 1 <= i <= n")
        with owned(self.store, self.output.recipe):
            return self._run(share, shares, workers, progress)

    def _run(self, share: int, shares: int, workers: int, progress: Callable[[int], object]) -> int:
        ours = range(self.num_shards * (share - 1) // shares, self.num_shards * share // shares)
        done = packing_record.finished(self.store, self.output.recipe)
        progress(sum(self._count(number) for number in ours if number in done))
        self._names = {number: packing_record.shard_of(path) for number, path in done.items()}
        missing = (self._shard(number) for number in ours if number not in done)
        for number, name in in_processes(partial(_make, self.output), missing, workers):
            self._names[number] = name
            progress(self._count(number))
        return self.num_shards - len(packing_record.finished(self.store, self.output.recipe))

    def finish(self) -> Manifest:
        """Write the manifest of all shards, which must exist, and delete shards and records that it does not need.

        Raises DataError for too many undecodable images, no decodable one, or images of one colour, and what the store
        raises.
        """
        with owned(self.store, self.output.recipe, alone=True):
            return self._finish()

    def _finish(self) -> Manifest:
        records = packing_record.finished(self.store, self.output.recipe)
        if len(records) < self.num_shards:
            if manifest := self._finished_by_another():
                return manifest
            lost = f"{self.num_shards - len(records)} of {count(self.num_shards, 'shard')} have no record"
            raise OutputError(
                f"{self.store.url}: {lost}; if another packing has just ended here, run the same command again"
            )
        indexed: list[Indexed] = []
        bad: list[BadImage] = []
        for part in packing_record.load_all(self.store, [records[number] for number in range(self.num_shards)]):
            bad.extend(part.bad)
            indexed += [part.indexed] if part.indexed else []
        packing_record.report(self.store, bad)
        total, listed = count(len(self.source), "image"), f"listed in {self.store.url}/{BAD}"
        if not indexed:
            raise DataError(f"none of {total} decodes, {listed}")
        if len(bad) > self.max_bad * len(self.source):
            raise DataError(
                f"{len(bad)} of {total} do not decode, {listed}; repair them, or leave them out with "
                f"--max-bad {math.ceil(1000 * len(bad) / len(self.source)) / 1000:g}; packed shards are kept"
            )
        merged = merge(indexed, self.source.class_names, self.source.attribution)
        if len(self.source) > 1 and (flaw := merged.info.flaw()):  # a single image is a trial
            raise DataError(f"{printable(self.store.url)}: {flaw}")
        former = _former_shards(self.store, self.endpoint_url)
        packing_record.save_listing(self.store, self.source.told)
        manifest = write_manifest(self.store, merged)
        self._clean(former, {shard.name for shard in manifest.shards})
        return manifest

    def _finished_by_another(self) -> Manifest | None:
        """The manifest of the same shards, if the same command has just written it elsewhere."""
        known = [name for _, name in sorted(self._names.items()) if name != packing_record.EMPTY]
        with suppress(DataError):
            manifest = read_manifest(f"{self.store.url}/{NAME}", self.endpoint_url)
            if len(self._names) == self.num_shards and [shard.name for shard in manifest.shards] == known:
                self._clean(set(), set(known))  # records that were written since
                return manifest
        return None

    def _count(self, number: int) -> int:
        return min(self.shard_size, len(self.source) - number * self.shard_size)

    def _shard(self, number: int) -> _Shard:
        first = number * self.shard_size
        return _Shard(number, first, self.source.part(first, first + self._count(number)))

    def _clean(self, former: set[str], current: set[str]) -> None:
        """Delete the shards of the former manifest and of unfinished packings, and all records of packings."""
        records = list(self.store.list(f"{PARTS}/"))
        abandoned = {name for path in records if SHARD.fullmatch(name := packing_record.shard_of(path))}
        for name in [*sorted((former | abandoned) - current), *records]:
            self.store.delete(name)
        # only our own files: the prefix may be a whole bucket
        ours = rf"{SHARD.pattern}|{PARTS}/.*|{re.escape(NAME)}|{re.escape(BAD)}|{re.escape(LISTING)}"
        self.store.discard_partials(re.compile(ours))


def _make(output: _Output, shard: _Shard) -> tuple[int, str]:
    """Write a shard and its record, or only the record if no image decodes; returns number and name. Runs in any process."""
    store = shared_store(output.url, output.endpoint_url)
    bad: list[BadImage] = []
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        indexed, name = None, packing_record.EMPTY
        if _write(local, _named(shard, bad), output.resolution, output.payload):
            indexed = index_shard(local, f"{shard.number:06d}")
            name = f"{shard.number:06d}-{indexed.shard.sha256[:12]}.tar"
            store.upload(name, local)
            indexed = replace(indexed, shard=indexed.shard._replace(name=name))
    packing_record.save(store, output.recipe, shard.number, Part(indexed, bad))
    return shard.number, name


def _named(shard: _Shard, bad: list[BadImage]) -> Iterator[tuple[str, Sample]]:
    """Decoded samples with their names in the tar; the others are appended to `bad`."""
    for number, item in enumerate(shard.items, shard.first):
        if isinstance(item, BadImage):
            bad.append(item)
        else:
            # webdataset treats everything after the first dot as the member's type; ustar names have at most 100 bytes
            readable = re.sub(r"[^A-Za-z0-9_-]+", "-", item.key)[-64:].strip("-")
            yield f"{number:08d}-{readable}", item


def _tar_writer() -> Any:
    """webdataset's TarWriter, without torch: webdataset loads it where it can, for classes that packing has no use for."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # to an import as if it were not installed
    try:
        from webdataset import TarWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return TarWriter


def _write(local: Path, samples: Iterable[tuple[str, Sample]], resolution: int | None, payload: str | None) -> int:
    """Write a tar and return its number of images."""
    TarWriter = _tar_writer()
    count = 0
    with (
        writing(local.parent, "; set TMPDIR elsewhere"),
        local.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for key, sample in samples:
            height, width = sample.image.shape[:2]
            if resolution not in (None, height):
                raise ConfigError(f"{printable(sample.key)}: is {height}x{width}, --resolution is {resolution}")
            kind = payload or ("npy" if height <= RAW_UP_TO else "png")
            members = {"__key__": key, kind: encode(sample.image, kind)}
            if sample.label >= 0:
                members["cls"] = str(sample.label).encode("ascii")
            tar.write(members)
            count += 1
    return count


def _former_shards(store: Store, endpoint_url: str | None) -> set[str]:
    """The shards that an earlier packing wrote here; none if its manifest cannot be read."""
    try:
        shards = read_manifest(f"{store.url}/{NAME}", endpoint_url).shards
    except DataError:
        return set()
    return {shard.name for shard in shards if SHARD.fullmatch(shard.name)}  # never delete shards of other programs


def main() -> int:
    args = parse(__doc__)
    from tqdm import tqdm

    choice = Choice(args.classes, args.split, tuple(args.include), tuple(args.exclude))
    output = getattr(open_store(args.out_url, args.endpoint_url), "root", None)
    source = open_source(
        args.source,
        args.resolution,
        args.resize,
        args.shuffle,
        choice=choice,
        max_bytes=args.max_decoded_mb << 20,
        output=output,
    )
    for line in source.told:
        print(line, file=sys.stderr)
    options = args.resolution, args.shard_size, args.payload, args.max_bad
    packing = Packing(source, args.out_url, args.endpoint_url, *options)
    with tqdm(desc="pack", total=None if args.part else len(source), unit="image", disable=None) as bar:
        missing = packing.run(args.part or (1, 1), args.workers, bar.update)
    if args.part:
        share, shares = args.part
        print(
            f"part {share}/{shares} is packed, {missing} of {count(packing.num_shards, 'shard')} are missing; once none is, "
            "the same command without --part makes them one data set"
        )
        return 0
    manifest = packing.finish()
    info = manifest.info
    print(
        f"{count(info.num_images, 'image')} {info.resolution}x{info.resolution}x{info.channels}, "
        f"{info.num_classes} class{'' if info.num_classes == 1 else 'es'}, "
        f"{count(len(manifest.shards), 'shard')} at {printable(args.out_url)}\n"
        f"sigma_data {info.sigma_data:.4f}, channel means {', '.join(f'{mean:.4f}' for mean in info.channel_mean)}\n"
        f"fingerprint {info.fingerprint}"
    )
    return 0


if __name__ == "__main__":
    run(main)
