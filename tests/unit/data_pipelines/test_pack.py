"""Packing, indexing, verifying: exact statistics, the same bytes every time, and never half a data set."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pack as pack_module
from data_pipelines.pack import Packing, pack
from data_pipelines.pack_arguments import parse
from data_pipelines.shards import packing_record
from data_pipelines.shards.manifest import NAME, read_manifest
from data_pipelines.shards.names import BAD, LISTING
from data_pipelines.shards.payload import PAYLOADS, decode
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.sources.open import open_source
from tests.support.commands import call
from tests.support.packing import contents, damages, noise_source, png
from warm_dist.errors import ConfigError, DataError, OutputError


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    source = noise_source(21)
    manifest = pack(source, str(tmp_path), shard_size=8)
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == manifest.key.tolist()
    assert [sample["cls"] for sample in samples] == manifest.label.tolist()
    assert all(np.array_equal(sample["npy"], item.image) for sample, item in zip(samples, source, strict=True))


def test_packing_again_gives_the_same_bytes_and_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    pack(noise_source(21), str(tmp_path / "a"), shard_size=8)
    pack(noise_source(21), str(tmp_path / "b"), shard_size=8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack(noise_source(21), str(tmp_path / "a"), shard_size=8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack(noise_source(13), str(tmp_path / "a"), shard_size=5)
    pack(noise_source(13), str(tmp_path / "c"), shard_size=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_bad_images_are_listed_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = pack(noise_source(20, bad=(3, 7)), str(tmp_path), max_bad=0.1)
    assert manifest.info.num_images == 18
    listed = [{"key": "n3", "reason": "cut short"}, {"key": "n7", "reason": "cut short"}]
    assert json.loads((tmp_path / BAD).read_text()) == listed
    assert "left out: n3: cut short\nleft out: n7: cut short" in capsys.readouterr().err
    pack(noise_source(20), str(tmp_path))
    assert not (tmp_path / BAD).exists()


def test_a_failed_packing_leaves_the_former_data_whole_and_is_taken_up(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    pack(noise_source(21), str(out), shard_size=8)
    before = contents(out)
    source = noise_source(40, bad=(39,))
    with pytest.raises(DataError, match=r"1 of 40 images do not decode.*--max-bad 0\.025"):
        pack(source, str(out), shard_size=4)
    assert before.items() <= contents(out).items()
    assert damages(read_manifest(f"{out}/{NAME}"), str(out)) == []
    # nothing of the source is read again, since every shard is there
    unread = dataclasses.replace(source, part=lambda start, stop: pytest.fail("read again"))
    pack(unread, str(out), shard_size=4, max_bad=0.025)
    pack(source, str(other), shard_size=4, max_bad=0.025)
    assert contents(out) == contents(other)


@pytest.mark.parametrize("position", [0, 9, 17, 39])
def test_an_interrupted_packing_goes_on_to_the_same_bytes(tmp_path: Path, position: int) -> None:
    source = noise_source(40)
    pack(source, str(tmp_path / "unbroken"), shard_size=4)

    def breaks(start: int, stop: int) -> Iterator[Sample | BadImage]:
        for number, item in enumerate(source.part(start, stop), start):
            if number == position:
                raise KeyboardInterrupt
            yield item

    pack(noise_source(13), str(tmp_path / "out"), shard_size=5)  # stands there until it is replaced
    with pytest.raises(KeyboardInterrupt):
        pack(dataclasses.replace(source, part=breaks), str(tmp_path / "out"), shard_size=4)
    assert read_manifest(f"{tmp_path}/out/{NAME}").info.num_images == 13
    pack(source, str(tmp_path / "out"), shard_size=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_what_killed_packers_left_goes_and_other_files_stay(tmp_path: Path) -> None:
    pack(noise_source(8), str(tmp_path / "alone"))
    (tmp_path / "out" / "parts" / "0123").mkdir(parents=True)
    ours = (
        ".000001-0123456789ab.tar.7.partial",
        "parts/0123/.000001.empty.npz.7.partial",
        ".manifest.parquet.7.partial",
    )
    others = (".thesis.tar.7.partial", "thesis.tar", "checkpoint/.weights.7.partial")
    (tmp_path / "out" / "checkpoint").mkdir()
    for name in (*ours, *others):
        (tmp_path / "out" / name).write_bytes(b"half")
    pack(noise_source(8), str(tmp_path / "out"))
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "alone").keys() | set(others)


def test_another_packing_is_not_mistaken_for_an_unfinished_one(tmp_path: Path) -> None:
    half = Packing(noise_source(40), str(tmp_path / "out"), shard_size=4)
    assert half.run(part=(1, 2)) == 5
    pack(noise_source(40), str(tmp_path / "out"), shard_size=4, payload="webp")
    pack(noise_source(40), str(tmp_path / "alone"), shard_size=4, payload="webp")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_parts_packed_anywhere_become_the_same_data_set(tmp_path: Path) -> None:
    pack(noise_source(50, bad=(3, 4, 5)), str(tmp_path / "whole"), shard_size=3, max_bad=0.1)
    missing = []
    for share in (3, 1, 2):
        packing = Packing(noise_source(50, bad=(3, 4, 5)), str(tmp_path / "out"), shard_size=3, max_bad=0.1)
        missing.append(packing.run(part=(share, 3)))
    assert missing == [11, 6, 0]
    packing.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(read_manifest(f"{tmp_path}/out/{NAME}").shards) == 16  # of 17: one had bad images only
    with pytest.raises(ConfigError, match="part 4/3"):
        packing.run(part=(4, 3))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_is_read_back(tmp_path: Path, payload: str) -> None:
    manifest = pack(noise_source(10), str(tmp_path), payload=payload)
    assert manifest.payload == payload
    assert damages(manifest, str(tmp_path)) == []
    data = (tmp_path / manifest.shards[0].name).read_bytes()
    for row, sample in enumerate(noise_source(10)):
        image = decode(data[manifest.offset[row] : manifest.offset[row] + manifest.length[row]])
        error = np.abs(image.astype(int) - sample.image).max()
        assert error <= (64 if payload == "jpg" else 0)  # noise is the worst that JPEG can meet
    assert pack(noise_source(10, size=65), str(tmp_path)).payload == "png"  # raw up to 64 px


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    """Fault: a manifest is written for no images, or for images of two sizes."""
    with pytest.raises(DataError, match="no images"):
        pack(noise_source(0), str(tmp_path))
    with pytest.raises(ConfigError, match="is 8x8, --resolution is 16"):
        pack(noise_source(2), str(tmp_path), resolution=16)
    with pytest.raises(ConfigError, match="shard_size 0"):
        pack(noise_source(2), str(tmp_path), shard_size=0)
    sizes = [Sample("a", -1, np.zeros((size, size, 3), np.uint8)) for size in (8, 16)]
    with pytest.raises(DataError, match=r"16x16 pixels, where 8x8 are needed"):
        pack(Source(2, (), "", lambda start, stop: sizes[start:stop]), str(tmp_path))
    assert not (tmp_path / NAME).exists()
    with pytest.raises(DataError, match="none of 2 images decodes"):
        pack(noise_source(2, bad=(0, 1)), str(tmp_path), max_bad=0.9)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a flag does not reach the packing, or a --part that does not exist is accepted."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(png(1))
    (tmp_path / "in" / "bad.png").write_bytes(png(1)[:50])
    words = [tmp_path / "in", tmp_path / "out", "--resolution", 4, "--workers", 1]
    with pytest.raises(DataError, match="1 of 2 images do not decode"):
        call(pack_module.main, *words)
    assert "left out: bad.png" in capsys.readouterr().err
    assert not (tmp_path / "out" / NAME).exists()
    assert call(pack_module.main, *words, "--max-bad", 0.5) == 0
    assert "1 image 4x4x3, 0 classes, 1 shard at" in capsys.readouterr().out
    for argument in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit) as caught:
            call(pack_module.main, *words, "--part", argument)
        assert caught.value.code == ConfigError.exit_code


def test_images_of_one_colour_are_refused_as_such(tmp_path: Path) -> None:
    """Fault: a broken export is packed, and training ends in a non-finite loss."""

    def flat(*shades: tuple[int, int, int]) -> Source:
        samples = [Sample(str(n), -1, np.full((8, 8, 3), shade, np.uint8)) for n, shade in enumerate(shades)]
        return Source(len(samples), (), "", lambda start, stop: samples[start:stop])

    with pytest.raises(
        DataError, match=r"out: all images are one colour, 200, 10, 10 of 255 \(sigma_data .*\); check how"
    ):
        pack(flat((200, 10, 10), (200, 10, 10)), str(tmp_path / "out"))
    assert not (tmp_path / "out" / NAME).exists()
    for number, shades in enumerate(
        [((9, 9, 9), (10, 9, 9)), ((9, 9, 9),)]
    ):  # one level of difference; a trial of one image
        assert pack(flat(*shades), str(tmp_path / f"out{number}")).info.num_images == len(shades)


def test_what_the_command_leaves_out_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a flag does not reach the listing, or what it left out is told to nobody."""
    for name in ("train/ant/a.png", "train/bee/b.png", "test/ant/c.png", "train/bee/b_mask.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(len(name)))
    words = [tmp_path / "in", tmp_path / "out", "--resolution", 8, "--workers", 1]
    with pytest.raises(ConfigError, match="several splits"):
        call(pack_module.main, *words)
    with pytest.raises(ConfigError, match="seem to be masks"):
        call(pack_module.main, *words, "--split", "train")
    assert call(pack_module.main, *words, "--split", "train", "--exclude", "*_mask.png", "--classes", "folders") == 0
    told = capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / LISTING).read_text())["source"]
    assert all(line in told for line in kept)
    assert kept[2:] == [
        "classes: 2, the folders 'ant', 'bee'",
        "left out: by --include and --exclude: 1 (1 .png; such as 'train/bee/b_mask.png')",
        "left out: not of the split train: 1 (1 .png; such as 'test/ant/c.png')",
    ]
    for name in ("train/ant/a.png", "train/bee/b.png"):
        Image.new("RGB", (1000, 1000)).save(tmp_path / "in" / name)
    with pytest.raises(DataError, match="none of 2 images decodes"):
        call(pack_module.main, *words, "--split", "train", "--exclude", "*_mask.png", "--max-decoded-mb", 2)
    assert "--max-decoded-mb allows 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--max-bad 1", "--max-bad nan", "--max-bad -1", "--max-bad x", "--shard-size 0", "--workers 0",
                                   "--workers 1.5", "--max-decoded-mb 0", "--shard-size 99999999999", "--include=", "--exclude= ",
                                   "--classes=", "--part 3/2", "--part 0/1"])  # fmt: skip
def test_flags_are_judged_before_anything_is_read(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a source of a million files is listed, and then a flag is refused; or it means something else."""
    with pytest.raises(SystemExit) as caught:
        parse(None, ["nowhere", "out", "--resolution", "8", *words.split(" ", 1)])
    assert caught.value.code == 2
    assert f"argument {words.replace('=', ' ').split(' ')[0]}: " in capsys.readouterr().err


def test_the_same_packing_twice_at_once_is_one_data_set(tmp_path: Path) -> None:
    """Fault: the second finds the records deleted and ends with an error, though the data set is complete."""
    first, second = (Packing(noise_source(21), str(tmp_path / "out"), shard_size=8) for _ in range(2))
    assert first.run() == 0
    second.run()
    manifest = first.finish()
    late = manifest.shards[1].name
    record = tmp_path / "out" / packing_record.path_of(second.output.recipe, 1, late)
    record.parent.mkdir(parents=True)
    record.write_bytes(b"written after the first had ended")
    assert second.finish().info.fingerprint == manifest.info.fingerprint
    pack(noise_source(21), str(tmp_path / "alone"), shard_size=8)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    other = Packing(noise_source(20), str(tmp_path / "out"), shard_size=8)
    other.run()
    shutil.rmtree(record.parent.with_name(other.output.recipe))
    with pytest.raises(OutputError, match="3 of 3 shards have no record"):
        other.finish()


def test_records_that_another_packing_removed_are_missed_by_name(tmp_path: Path) -> None:
    """Fault: a KeyError."""
    packing = Packing(noise_source(8), str(tmp_path), shard_size=4)
    packing.run(part=(1, 2))
    with pytest.raises(OutputError, match="1 of 2 shards have no record; if another packing has just ended here"):
        packing.finish()


def test_names_and_reasons_are_printed_escaped_and_listed_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "\x1b[2J\u202eevil\n.png").write_bytes(b"")
    (tmp_path / "in" / "good.png").write_bytes(png(0))
    for out in ("one", "two"):
        pack(open_source(str(tmp_path / "in"), 8), str(tmp_path / out), max_bad=0.5)
        assert r"left out: \x1b[2J\u202eevil\n.png: empty" in capsys.readouterr().err
    assert (tmp_path / "one" / BAD).read_bytes() == (tmp_path / "two" / BAD).read_bytes()
