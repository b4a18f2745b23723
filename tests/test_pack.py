"""Packing, indexing, verifying: exact statistics, the same bytes every time, and never half a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from data_pipelines import index, pack, verify
from data_pipelines.pack import BAD, Packing, pack
from data_pipelines.shards.indexed import index_shard
from data_pipelines.shards.manifest import Manifest, NAME, read_manifest, write_manifest
from data_pipelines.shards.payload import PAYLOADS, decode
from data_pipelines.sources.base import BadImage, Sample, Source
from data_pipelines.sources.open import open_source
from data_pipelines.verify import verify
from warm_dist.diffusion.spectrum import dct
from warm_dist.errors import BucketError, ConfigError, DataError
from warm_dist.store.open import open_store

if TYPE_CHECKING:
    from conftest import Packed


def noise_source(count: int, size: int = 8, channels: int = 3, bad: tuple[int, ...] = ()) -> Source:
    def part(start: int, stop: int) -> Iterator[Sample | BadImage]:
        for number in range(start, stop):
            if number in bad:
                yield BadImage(f"n{number}", "cut short")
            else:
                pixels = np.random.default_rng(number).integers(0, 256, (size, size, channels), np.uint8)
                yield Sample(f"folder.v2/n{number}.png", number % 3, pixels // (1 + number % 2))

    return Source(count, ("a", "b", "c"), "made up", part)


def damages(manifest: Manifest, url: str, endpoint_url: str | None = None, workers: int = 1) -> list[str]:
    return [line for found in verify(manifest, url, endpoint_url, workers) for line in found]


def contents(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("channels", "payload"), [(3, "npy"), (1, "png")])
def test_statistics_equal_a_direct_computation(tmp_path: Path, channels: int, payload: str) -> None:
    source = noise_source(50, channels=channels)
    info = pack(source, str(tmp_path), shard_size=16, payload=payload).info
    x = np.stack([item.image for item in source]).transpose(0, 3, 1, 2) / 127.5 - 1
    mean = x.mean((0, 2, 3))
    spectrum = (dctn(x - mean[:, None, None], axes=(2, 3), norm="ortho") ** 2).mean((0, 1))
    assert (info.resolution, info.channels, info.num_classes, info.num_images) == (8, channels, 3, 50)
    np.testing.assert_allclose(info.channel_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(info.mean_image, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(info.power_spectrum, spectrum, rtol=1e-10)
    low = dct(torch.from_numpy(x - mean[:, None, None]))[..., :4, :4].reshape(len(x), -1).numpy()
    np.testing.assert_allclose(info.low_mean, low.mean(0), atol=1e-12)
    np.testing.assert_allclose(info.low_covariance, np.cov(low.T, bias=True), atol=1e-11)
    assert info.sigma_data == pytest.approx(math.sqrt(spectrum.mean()), rel=1e-12)


def test_manifest_survives_the_round_trip_and_places_every_payload(tmp_path: Path) -> None:
    source = noise_source(21)
    written = pack(source, str(tmp_path), shard_size=8)
    read = read_manifest(f"{tmp_path}/{NAME}")
    assert read.info.fingerprint == written.info.fingerprint == contents(tmp_path)[NAME]
    for field in dataclasses.fields(written):
        if field.name != "info":
            assert np.array_equal(getattr(read, field.name), getattr(written, field.name)), field.name
    for field in dataclasses.fields(written.info):
        assert np.array_equal(getattr(read.info, field.name), getattr(written.info, field.name)), field.name
    assert [shard.num_images for shard in read.shards] == [8, 8, 5]
    assert read.class_names == ("a", "b", "c")
    assert read.attribution == "made up"
    for row, sample in enumerate(source):
        data = (tmp_path / read.shards[read.shard[row]].name).read_bytes()
        payload = data[read.offset[row] : read.offset[row] + read.length[row]]
        assert np.array_equal(decode(payload), sample.image)
        assert read.label[row] == sample.label


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


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    packing = Packing(noise_source(8), str(tmp_path), shard_size=4)
    packing.run()
    record = next((tmp_path / "parts").rglob("*.npz"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{record.name}: is damaged .* delete it"):
        packing.finish()
    record.unlink()
    assert packing.run() == 0
    assert packing.finish().info.num_images == 8


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


def foreign_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(seed: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_foreign_shards_get_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-very-long-folder-name-that-does-not-fit-into-an-ustar-header/" * 3  # GNU and pax extensions
    foreign_tar(
        tmp_path / "x.tar", {f"{name}one.png": png(1), f"{name}one.cls": b"4", "d/two.PNG": png(2), "d/two.cls": b"0\n"}
    )
    foreign_tar(tmp_path / "y.tar", {"three.json": b"{}", "three.cls": b"1", "three.png": png(3)})
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path)])
    assert index.main() == 0
    manifest = read_manifest(f"{tmp_path}/{NAME}")
    assert manifest.key.tolist() == [f"{name}one", "d/two", "three"]
    assert manifest.label.tolist() == [4, 0, 1]
    assert (manifest.info.num_classes, manifest.payload, manifest.info.resolution) == (5, "png", 8)
    assert damages(manifest, str(tmp_path)) == []
    pack(noise_source(3), str(tmp_path))  # takes the place, but deletes nothing that it did not write
    assert {"x.tar", "y.tar"} <= set(contents(tmp_path))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": png(1), "a.jpg": png(1)}, "needs one image"),
        ({"a.cls": b"1"}, "needs one image"),
        ({"a.png": png(1), "a.cls": b"cat"}, "the label 'cat'"),
        ({"a.png": b"no image"}, "image 'a' in shard x.tar: does not decode"),
        ({"a.png": png(1), "b.png": png(2, 16)}, "image 'b' in shard x.tar.*are needed"),
        ({"a.png": png(1), "a.PNG": png(2)}, "member 'a.PNG' occurs twice"),
    ],
)
def test_foreign_shards_that_cannot_be_used(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    foreign_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=words):
        index_shard(tmp_path / "x.tar", "x.tar")


def test_truncated_tars_and_garbage_inside_are_noticed(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "whole.tar", {f"{n}.png": png(n) for n in range(4)})
    whole = (tmp_path / "whole.tar").read_bytes()
    second = whole.index(b"1.png")
    for damaged in (
        whole[: second + 20],
        whole[:second],
        whole[: second + 600],
        whole[:second] + os.urandom(512) + whole[second + 512 :],
    ):
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.tar: (not a readable tar|truncated)"):
            index_shard(tmp_path / "x.tar", "x.tar")


def test_manifests_that_lie_are_refused(tmp_path: Path) -> None:
    good = pack(noise_source(21), str(tmp_path), shard_size=8)
    store = open_store(str(tmp_path / "lies"))
    broken_label, outside = good.label.copy(), good.offset.copy()
    broken_label[4], outside[20] = 3, 10**9
    for change, words in (
        ({"label": broken_label}, "labels from 0 to 3"),
        ({"offset": outside}, "places image '00000020-folder-v2-n20-png' in shard .* outside"),
        ({"shards": good.shards[:2]}, "shard by shard"),
        ({"info": dataclasses.replace(good.info, sigma_data=math.nan)}, "not finite"),
        ({"info": dataclasses.replace(good.info, sigma_data=0.9)}, "sigma_data 0.9"),
        ({"info": dataclasses.replace(good.info, num_images=22)}, "header counts 22"),
    ):
        with pytest.raises(DataError, match=words):
            write_manifest(store, dataclasses.replace(good, **change))
    data = (tmp_path / NAME).read_bytes()
    table = pq.read_table(tmp_path / NAME)
    header = table.schema.metadata[b"warm-dist"]

    def parquet(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    newer = header.replace(b'"version": 2', b'"version": 9')
    halved = header[: len(header) // 2]
    for damaged, words in (
        (data[:-100], "not a readable Parquet"),
        (b"", "not a readable Parquet"),
        (parquet(table.replace_schema_metadata({"warm-dist": newer})), "version 9, this program reads 2"),
        (parquet(table.replace_schema_metadata({"warm-dist": halved})), "damaged header"),
        (parquet(table.replace_schema_metadata({})), "no warm-dist header"),
        (parquet(table.drop_columns(["crc32"])), "'crc32': 'missing'"),
        (parquet(table[:20]), "has 20 rows, its header counts 21"),
    ):
        store.write(NAME, damaged)
        with pytest.raises(DataError, match=words):
            read_manifest(f"{store.url}/{NAME}")


def test_verify_lists_every_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = pack(noise_source(21), str(tmp_path), shard_size=8)
    path = tmp_path / manifest.shards[1].name
    data = bytearray(path.read_bytes())
    data[manifest.offset[9] + 200] ^= 1
    path.write_bytes(data)
    (tmp_path / manifest.shards[2].name).unlink()
    monkeypatch.setattr(sys, "argv", ["verify", f"{tmp_path}/{NAME}"])
    with pytest.raises(DataError, match="3 damages") as caught:
        verify.main()
    assert f"image '{manifest.key[9]}' in shard {path.name}: crc32 differs" in str(caught.value)
    assert f"shard {path.name}: sha256 differs" in str(caught.value)
    assert f"{manifest.shards[2].name}: does not exist" in str(caught.value)


@pytest.mark.slow
def test_several_processes_pack_index_and_verify_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("digits", 8)
    manifest = pack(source, str(tmp_path / "one"), shard_size=100)
    told: list[int] = []
    pack(source, str(tmp_path / "two"), shard_size=100, workers=2, progress=told.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(told) == 1797
    shard = tmp_path / "two" / manifest.shards[4].name
    shard.write_bytes(shard.read_bytes()[:-1024] + bytes(1023) + b"x")
    assert damages(manifest, str(tmp_path / "two"), workers=2) == [
        f"shard {shard.name}: sha256 differs from the manifest's"
    ]
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path / "one"), "--workers", "2"])
    index.main()
    again = read_manifest(f"{tmp_path}/one/{NAME}")
    assert "1797 images in 18 shards" in capsys.readouterr().out
    for name in ("key", "label", "offset", "length", "crc32"):
        assert np.array_equal(getattr(again, name), getattr(manifest, name)), name
    assert np.array_equal(again.info.power_spectrum, manifest.info.power_spectrum)


def test_packing_to_s3(digits: Packed) -> None:
    assert digits.manifest.info.num_images == 1797
    assert damages(digits.manifest, digits.url, digits.endpoint_url) == []
    read = read_manifest(digits.manifest_url, digits.endpoint_url)
    assert read.info.fingerprint == digits.manifest.info.fingerprint
    with pytest.raises(BucketError, match="no-such-bucket"):
        pack(noise_source(2), "s3://no-such-bucket/x", digits.endpoint_url)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(png(1))
    (tmp_path / "in" / "bad.png").write_bytes(png(1)[:50])
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--resolution", "4"]
    command = [sys.executable, "-m", "data_pipelines.pack", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == DataError.exit_code
    assert "left out: bad.png" in done.stderr
    assert "DataError: 1 of 2 images do not decode" in done.stderr
    assert not (tmp_path / "out" / NAME).exists()
    monkeypatch.setattr(sys, "argv", ["pack", *arguments, "--max-bad", "0.5", "--workers", "1"])
    assert pack.main() == 0
    assert "1 images 4x4x3, 0 classes, 1 shards" in capsys.readouterr().out
    for argument in ("0/2", "3/2", "1", "a/b"):
        monkeypatch.setattr(sys, "argv", ["pack", *arguments, "--part", argument])
        with pytest.raises(SystemExit) as caught:
            pack.main()
        assert caught.value.code == ConfigError.exit_code


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(tmp_path: Path) -> None:
    """Two processes and three parts, kill -9 in the middle: no process stays, and what was done is not done again."""
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(number, 64))

    def command(out: str, *more: str) -> list[str]:
        words = ["data_pipelines.pack", str(tmp_path / "in"), str(tmp_path / out), "--resolution", "32"]
        return [sys.executable, "-m", *words, "--shuffle", "--shard-size", "4", *more]

    subprocess.run(command("whole", "--workers", "1"), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command("out", "--workers", "2"), start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out").rglob("*.npz"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while session_members(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert not (tmp_path / "out" / NAME).exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npz")}
    assert 5 <= len(done) < 75
    for share in ("2/3", "1/3", "3/3"):
        told = subprocess.run(command("out", "--part", share), check=True, capture_output=True, text=True).stdout
        assert f"part {share} is packed" in told
    assert {path: path.stat().st_mtime_ns for path in done} == done
    subprocess.run(command("out"), check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def session_members(session: int) -> list[str]:
    """Processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.parent.name)
    return found
