"""Keys and folders with every character that means something elsewhere: the whole chain, from packing to weights."""

from __future__ import annotations

import json
import sys
import urllib.parse
from pathlib import Path

import pytest

from data_pipelines import info, verify
from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from launch import evaluate, export
from tests.support.packed import Packed
from tests.support.training import BATCH, digits_config, environment, finish, fork
from tests.support.zygote import zygote
from warm_dist.checkpoints.weights import load_weights
from warm_dist.files import file_sha256
from warm_dist.store.download import fetch
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server

ODD = "set#1 50%20 a?b=c+d&e 'q' \"r\" é e\u0301 日/x:y@z;~"
EVAL = {"eval_nimg": 2 * BATCH, "before_training": False, "num_images": 8, "num_blocks": 1, "kid_images": 0, "grid": 1}
ENDS = (
    "sampler.num_steps=3",
    f"eval={json.dumps({**EVAL, 'extractor': 'pixels'})}",
    "engine=local",
    f"train.total_nimg={2 * BATCH}",
    f"train.save_nimg={2 * BATCH}",
)


def command(main, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    assert main() == 0


@pytest.mark.parametrize("kind", ["s3", "file URL", "folder"])
def test_they_survive_the_whole_chain(
    kind: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: config, weights or messages with the name cut at `#` or decoded twice, so that evaluate.py finds nothing."""
    root, endpoint = str(tmp_path / ODD), None
    if kind == "s3":
        root, endpoint = f"s3://warm-dist/{ODD}", s3.endpoint_url
    elif kind == "file URL":
        root = f"file://{urllib.parse.quote(root)}"
    at = ["--endpoint-url", endpoint] if endpoint else []
    digits = Packed(f"{root}/digits", endpoint, pack(open_source("digits", 8), f"{root}/digits", endpoint))
    for main in (info.main, verify.main):
        command(main, monkeypatch, digits.manifest_url, *at)
    run = tmp_path / "runs" / ODD
    place = [f"checkpoint.url={root}/run", *([f"checkpoint.endpoint_url={endpoint}"] if endpoint else [])]
    code, _, err = finish(fork(digits_config(tmp_path, digits), run, *ENDS, *place))
    assert code == 0, err
    assert f"checkpoints/{2 * BATCH:012d}/COMPLETE" in open_store(f"{root}/run", endpoint).list()
    weights = tmp_path / ODD / "w#1.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    command(export.main, monkeypatch, f"{root}/run", "--out", str(weights), *at)
    manifest = load_weights(weights).config.data.manifest
    assert open_store(manifest.rpartition("/")[0], endpoint).read("manifest.parquet")
    (copies := open_store(f"{root}/copies", endpoint)).upload("w#%20 1.safetensors", weights)
    assert copies.read("w#%20 1.safetensors") == weights.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache é#"))
    name = "w#%20 1.safetensors" if kind != "file URL" else urllib.parse.quote("w#%20 1.safetensors")
    found = fetch(f"{root}/copies/{name}", file_sha256(weights), endpoint_url=endpoint)
    assert found.read_bytes() == weights.read_bytes()
    capsys.readouterr()
    out = tmp_path / "out" / ODD
    words = ["--blocks", "1", "--nfe", "3", "--out", str(out)]
    process = zygote().start(str(Path(evaluate.__file__)), str(weights), *words, env=environment())
    code, _, err = finish(process)
    assert code == 0, err
    assert (out / "table.csv").exists()
