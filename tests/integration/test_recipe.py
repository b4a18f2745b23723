"""The README's way from the ImageNet folder to training, every command as printed, on 200 images of that layout."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.manifest import NAME, read_manifest
from data_pipelines.shards.payload import decode
from data_pipelines.sources.transform import Transform, decode_image
from tests.support.processes import ROOT, free_port
from warm_dist.runs.metrics import read_metrics
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server

pytestmark = pytest.mark.timeout(600)
SYNSETS = [f"n{number:08d}" for number in (1440764, 1443537, 2007558, 2093428, 2123045, 2510455, 3000134, 3769881, 4254777, 7579787)]  # fmt: skip
SMALL = {
    "engine": "local",
    "data.num_classes": 10,
    "data.num_lanes": 8,
    "data.window": 16,
    "network.channels": 8,
    "network.channel_mult": [1, 2],
    "network.num_blocks": 1,
    "network.attention_resolutions": [],
    "train.total_nimg": 64,
    "train.batch_size": 16,
    "train.micro_batch_size": 8,
    "train.log_nimg": 16,
    "train.save_nimg": 64,
    "parallel.precision": "fp32",
    "eval": None,
}


def imagenet(root: Path) -> Path:
    """20 pictures in each of 10 class folders: sizes and oddities as in the original."""
    rng = np.random.default_rng(0)
    for number in range(200):
        folder = root / "ILSVRC" / "Data" / "CLS-LOC" / "train" / SYNSETS[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = (int(side) for side in rng.integers(70, 500, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        path = folder / f"{folder.name}_{number}.JPEG"
        if number == 7:
            picture.save(path, "PNG")  # one of ImageNet's files is
        else:
            picture.convert({11: "CMYK", 12: "L"}.get(number, "RGB")).save(path, "JPEG")
    return root / "ILSVRC"


def commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().partition("## ImageNet at 64×64")[2].partition("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block
    return [shlex.split(line) for line in block[1].splitlines()]


def run(words: list[str]) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_the_imagenet_folder_to_a_trained_network(s3: S3Server, tmp_path: Path) -> None:
    """Fault: a README command that does not run as printed, or a label or pixel that changes on the way."""
    tree, url = imagenet(tmp_path), f"s3://warm-dist/{tmp_path.name}"
    bin_folder = Path(sys.executable).parent
    here = {"ILSVRC/Data/CLS-LOC/train": f"{tree}/Data/CLS-LOC/train", ".venv/bin": str(bin_folder)}
    outputs = []
    for words in commands():
        for printed, real in {**here, "s3://your-bucket": url}.items():
            words = [word.replace(printed, real) for word in words]
        if words[0].endswith("python"):
            more = ["--endpoint-url", s3.endpoint_url]
            words += [*more, "--shard-size", "64"] if "data_pipelines.pack" in words else more
        else:
            words[1:1] = ["--num_gpus", "2", "--master_port", str(free_port())]
            sets = {**SMALL, "data.endpoint_url": s3.endpoint_url, "output": str(tmp_path / "run")}
            words += [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        outputs.append(run(words))
    assert "200 images 64x64x3, 10 classes, 4 shards" in outputs[0]
    assert "200 images in 4 shards are as packed" in outputs[1]
    assert f"20 to 20 images each: {', '.join(SYNSETS[:5])}" in outputs[2]

    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (end["code"], end["nimg"]) == (0, 64)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 4
    assert np.isfinite(losses).all()

    manifest = read_manifest(f"{url}/imagenet64/{NAME}", s3.endpoint_url)
    assert manifest.class_names == tuple(SYNSETS)
    assert len(set(manifest.label[:64])) > 5, "classes are mixed before they are cut into shards"
    store = open_store(f"{url}/imagenet64", s3.endpoint_url)
    for row in (0, 77, 199):
        name = manifest.key[row].partition("-")[2].replace("-JPEG", ".JPEG").replace("-", "/")
        start, length = int(manifest.offset[row]), int(manifest.length[row])
        payload = store.read(manifest.shards[manifest.shard[row]].name, start, length)
        original = (tree / "Data" / "CLS-LOC" / "train" / name).read_bytes()
        assert np.array_equal(decode(payload), decode_image(original, Transform(64, "adm")))
        assert SYNSETS[manifest.label[row]] == name.partition("/")[0]
