"""Data sets: what packing writes, and what the other commands say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from tests.golden.workshop import Workshop, sha

SETS = {
    "digits8": "digits digits8 --resolution 8 --shard-size 500",
    "openmoji16": "openmoji openmoji16 --resolution 16",
    "folder32": "pictures folder32 --resolution 32 --resize adm --shuffle --shard-size 16 --payload png --max-bad 0.1",
    "folder16": "pictures folder16 --resolution 16 --shard-size 16 --max-bad 0.1",
}
"""Name → the arguments of `data_pipelines.pack`."""


def pack(shop: Workshop, names: Iterable[str]) -> None:
    """Pack these SETS below their names, unless that is done."""
    if not (shop.folder / "pictures").exists():
        _draw(shop)
    missing = [SETS[name] for name in names if not (shop.folder / name).exists()]
    shop.out(*(["-m", "data_pipelines.pack", *words.split(), "--workers", "1"] for words in missing))


def values(shop: Workshop) -> dict[str, Any]:
    """For each set: its shards, its facts, its fingerprint. Two parts make the same data set; so does `index` of shards."""
    pack(shop, SETS)
    _in_parts(shop)
    (shop.folder / "indexed").mkdir()
    for path in (shop.folder / "folder16").glob("*.tar"):
        shutil.copy(path, shop.folder / "indexed")
    commands = [["-m", "data_pipelines.index", "indexed", "--workers", "1"]]
    names = [*SETS, "parts", "indexed"]
    commands += [["-m", "data_pipelines.verify", f"{name}/manifest.parquet", "--workers", "1"] for name in names]
    commands += [["-m", "data_pipelines.info", f"{name}/manifest.parquet"] for name in names]
    commands += [["-m", "data_pipelines.info", f"{name}/manifest.parquet", "--json"] for name in names]
    said = shop.out(*commands)
    facts = [json.loads(text) for text in said[-len(names) :]]
    out: dict[str, Any] = {name: _describe(shop, name, found) for name, found in zip(names, facts, strict=True)}
    return out | {"what index, verify and info say": sha("".join(said[: -len(names)]))}


def _describe(shop: Workshop, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    out = {"fingerprint": facts.pop("fingerprint"), "statistics": [facts.pop("sigma_data"), *facts.pop("channel_mean")]}
    out["facts"] = sha(json.dumps(facts, sort_keys=True))
    out["shards"] = {path.name: shop.sha(f"{name}/{path.name}") for path in sorted((shop.folder / name).glob("*.tar"))}
    bad = shop.folder / name / "bad_images.json"
    if bad.exists():
        out["bad images"] = sha(shop.plain(bad.read_text()))
    return out


def _in_parts(shop: Workshop) -> None:
    words = SETS["folder16"].replace(" folder16 ", " parts ").split()
    for part in (["--part", "2/2"], ["--part", "1/2"], []):
        shop.out(["-m", "data_pipelines.pack", *words, "--workers", "1", *part])


def _draw(shop: Workshop) -> None:
    """40 pictures of three classes, of several shapes and modes, and one that does not decode. Integers only."""
    shapes = [(40, 33), (64, 48), (32, 32), (17, 90)]
    for number in range(40):
        height, width = shapes[number % len(shapes)]
        rows, columns = np.mgrid[0:height, 0:width]
        planes = [(rows * (3 + number) + columns * (k + 2) + (rows * columns >> (k + 1))) % 256 for k in range(4)]
        pixels = np.stack(planes, -1).astype(np.uint8)
        folder = shop.folder / "pictures" / f"class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        mode = ("RGB", "RGBA", "L")[number % 3]
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels[..., : len(mode)]).save(folder / f"{number:02d}.png")
    (shop.folder / "pictures" / "class_1" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
