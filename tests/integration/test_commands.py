"""The commands that use a finished run: sample, evaluate, trajectory; on a random-BNR and on a cold run of a few steps."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.pack import pack
from data_pipelines.sources.open import open_source
from tests.support.paths import ROOT
from tests.support.zygote import zygote

RANDOM = {"kind": "log_uniform", "low": 0.1, "high": 2.0}


def command(name: str, *args: object, start: bool = False) -> subprocess.CompletedProcess[str]:
    """launch/NAME.py to its end, as a fork; start: by a python of its own, which every command needs once."""
    parts = [str(ROOT / "launch" / f"{name}.py"), *map(str, args)]
    if start:
        return subprocess.run([sys.executable, *parts], capture_output=True, text=True, timeout=200, check=False)
    return zygote().run(*parts)


CUT_OFF = """
import os, runpy, signal, sys
from warm_dist.evaluation import evaluator
generate, made = evaluator.generate, []
def deadly(*args, **given):
    made.append(1)
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*args, **given)
evaluator.generate = deadly
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A command that is killed at its third call of `generate`."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/random, runs/cold, runs/weak and the data they saw, all trained for 64 images with labels and augmentation."""
    root = tmp_path_factory.mktemp("commands")
    pack(open_source("digits", 8), str(root / "data"))
    tree = {
        "output": "",
        "engine": "local",
        "data": {"manifest": f"{root}/data/manifest.parquet", "resolution": 8, "channels": 1, "num_classes": 10, "num_lanes": 8},
        "process": {"bnr": RANDOM},
        "network": {"arch": "ncsnpp", "channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4]},
        "train": {"total_nimg": 64, "batch_size": 32, "lr": 1e-3, "label_dropout": 0.2, "augment": 0.2,
                  "ema_half_life_nimg": 100, "log_nimg": 32, "save_nimg": 64},
        "parallel": {"activation_checkpointing": True},
        "sampler": {"num_steps": 4, "bnr": 0.5},
        "eval": {"eval_nimg": 64, "num_images": 64, "extractor": "pixels", "reference_images": 256, "grid": 4},
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(tree))
    for name, settings in [
        ("random", []),
        ("weak", ["train.seed=1"]),
        ("cold", ['process.bnr={"kind":"cold"}', "sampler.bnr=null"]),
    ]:
        overrides = [part for s in [*settings, f"output={root}/{name}"] for part in ("--set", s)]
        done = command("train", "--config", root / "config.json", *overrides)
        assert done.returncode == 0, done.stderr
    return root


def test_training_logged_the_heads_and_evaluated(runs):
    """Fault: a train line without head_inconsistency, or a run that skips its first or last evaluation."""
    lines = [json.loads(line) for line in (runs / "random" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert all(0 < line["head_inconsistency"] < 10 for line in train)
    assert len([line for line in lines if line["kind"] == "eval"]) == 2


@pytest.mark.parametrize("args", [
    ["--bnr", "2", "--method", "multistep", "--nfe", "5"],
    ["--method", "ancestral", "--set", "sampler.eta=0.5", "--label", "3"],
    ["--set", "sampler.guidance=2"],
    ["--set", 'sampler.bnr={"kind":"power","bnr":0.5,"exponent":0.3,"cap":1.0}', "--set", "sampler.grid=log_linear"],
], ids=["bnr", "eta", "guidance", "path"])  # fmt: skip
def test_one_network_is_sampled_in_many_ways(runs, tmp_path, args):
    """Fault: a sampler option that launch/sample.py accepts and that fails while it samples."""
    out = tmp_path / "out.npy"
    done = command("sample", "--weights", runs / "random", "--n", 3, "--out", out, *args, start="--bnr" in args)
    assert done.returncode == 0, done.stderr
    assert np.load(out).shape == (3, 1, 8, 8)


def test_autoguidance_takes_a_second_run(runs, tmp_path):
    """Fault: a guide that is named in the output and not used, or the network without labels in its place."""
    weak = runs / "weak" / "weights" / "ema.safetensors"
    images = []
    for options in ([], ["sampler.guidance=3"], ["sampler.guidance=3", f"sampler.guide={weak}"]):
        out = tmp_path / f"{len(options)}.npy"
        words = [word for option in options for word in ("--set", option)]
        done = command("sample", "--weights", runs / "random", "--n", 3, "--label", 1, "--out", out, *words)
        assert done.returncode == 0, done.stderr
        images.append(np.load(out).tobytes())
    assert f"guidance 3 by {weak}" in done.stdout
    assert len(set(images)) == 3


def test_evaluate_fills_a_table_once(runs, tmp_path):
    """Fault: two BNRs under one key of results.json, or a second call that samples again."""
    out = tmp_path / "not" / "yet"
    args = [runs / "random", "--bnr", 0.1, 2, "--method", "multistep", "--nfe", 5, "--out", out]
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert sorted(line["bnr"] for line in results.values()) == ["0.1", "2"]
    assert len({line["frechet"] for line in results.values()}) == 2
    assert {line["blocks"] for line in results.values()} == {3}, "three blocks of seeds by default"
    before = (out / "results.json").stat().st_mtime_ns
    again = command("evaluate", *args)
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    assert "sampling" not in again.stdout
    assert (out / "results.json").stat().st_mtime_ns == before
    assert len(list((out / "samples").glob("*.png"))) == 2


def test_a_surface_is_a_table_a_picture_and_goes_on_where_it_was(runs, tmp_path):
    """NFE x BNR between commas; one block first, killed on the way to the second, then the rest alone."""
    args = [
        runs / "random",
        "--nfe",
        "4,5",
        "--bnr",
        "0.1,0.5,2",
        "--method",
        "heun",
        "--num-images",
        64,
        "--out",
        tmp_path,
    ]
    done = command("evaluate", *args, "--blocks", 1)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "results.json").read_text())
    assert sorted((line["bnr"], line["nfe"]) for line in first.values()) == [
        (bnr, nfe) for bnr in ("0.1", "0.5", "2") for nfe in (3, 5)
    ], "heun spends 3 of 4"
    assert all(line["spread"] is None and len(line["per_block"]) == 1 for line in first.values())

    broken = zygote().run("-c", CUT_OFF, ROOT / "launch" / "evaluate.py", *args, "--blocks", 2)
    assert broken.returncode == -signal.SIGKILL
    partly = json.loads((tmp_path / "results.json").read_text())
    blocks = [len(line["per_block"]) for line in partly.values()]
    assert blocks == [2, 2, 1, 1, 1, 1]
    done = command("evaluate", *args, "--blocks", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sampling 64 images") == sum(2 - count for count in blocks)
    results = json.loads((tmp_path / "results.json").read_text())
    for key, line in results.items():
        assert line["per_block"][0] == first[key]["per_block"][0]
        distances = [block["frechet"] for block in line["per_block"]]
        assert line["frechet"] == pytest.approx(sum(distances) / 2)
        assert line["spread"] == pytest.approx(abs(distances[0] - distances[1]) / 2**0.5)
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(row["bnr"], row["nfe"], row["frechet"]) for row in table} == {
        (line["bnr"], str(line["nfe"]), str(line["frechet"])) for line in results.values()
    }
    with Image.open(tmp_path / "surface.png") as picture:
        assert picture.width > 1000


def test_checkpoints_are_a_list_to_evaluate(runs, tmp_path):
    """Fault: a checkpoint and its run measured as two networks, or a truncated checkpoint exported."""
    (newest,) = (runs / "random" / "checkpoints").glob("[0-9]*")
    args = [newest, runs / "random", "--num-images", 64, "--blocks", 1, "--out", tmp_path]
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    (only,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert only["blocks"] == 1, "the run's weights are those of its newest checkpoint"
    (rank,) = newest.glob("rank_0.safetensors")
    whole = rank.read_bytes()
    (runs / "random" / "weights" / f"ema_{newest.name}.safetensors").unlink()
    rank.write_bytes(whole[:-4])
    assert command("evaluate", *args).returncode == 4
    rank.write_bytes(whole)


def test_a_sampler_that_leaves_the_numbers_is_a_cell_and_not_the_end(runs, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "wild.safetensors"
    with safe_open(runs / "random" / "weights" / "ema.safetensors", framework="np") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    del header["sha256"]  # of other bytes
    save_file({key: value * np.float32(np.nan) for key, value in tensors.items()}, path, header)
    args = [path, runs / "random", "--num-images", 64, "--blocks", 2, "--out", tmp_path / "out"]
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    wild, sane = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert (wild["frechet"], "non-finite" in wild["problem"]) == (None, True)
    assert len(sane["per_block"]) == 2
    assert "not finite" in done.stdout
    assert "sampling" not in command("evaluate", *args).stdout, "and is not tried again"


def test_networks_that_differ_by_seed_alone_are_averaged(runs, tmp_path):
    args = [runs / "random", runs / "weak", "--bnr", 0.5, 1, "--method", "first_order", "--nfe", 2, "--out", tmp_path]
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text()).values()
    *_, first, second = done.stdout.splitlines()
    for row, bnr in ((first, "0.5"), (second, "1")):
        values = [line["frechet"] for line in results if line["bnr"] == bnr]
        assert len(values) == 2
        mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
        assert row.startswith("2 seeds as ")
        assert f" {mean:.2f} ± {half * 2**0.5:.2f}   {mean - half:.2f} … {mean + half:.2f}" in row


def test_evaluate_agrees_with_the_run_itself(runs, tmp_path):
    done = command("evaluate", runs / "random", "--out", tmp_path, start=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (runs / "random" / "metrics.jsonl").read_text().splitlines()]
    [ours] = json.loads((tmp_path / "results.json").read_text()).values()
    theirs = [line for line in lines if line["kind"] == "eval"][-1]
    assert ours["spec"] == theirs["spec"]
    assert ours["frechet"] == pytest.approx(theirs["frechet"], rel=1e-6)


@pytest.mark.parametrize(("run", "args", "names"), [
    ("random", ["--bnr", "0.1", "1"], ["forward_bnr_0.1", "sampling_bnr_0.1", "forward_bnr_1", "sampling_bnr_1"]),
    ("cold", ["--method", "cold"], ["forward_cold", "sampling_cold"]),
])  # fmt: skip
def test_trajectory_draws_the_way_up_and_down(runs, tmp_path, run, args, names):
    """Fault: a blank picture, or one that the next BNR overwrites."""
    done = command("trajectory", runs / run, "--n", 2, "--columns", 4, "--out", tmp_path, *args, start=run == "cold")
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(names)
    for path in tmp_path.glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 20


def test_what_cannot_be_done_is_one_line_and_a_code(runs, tmp_path):
    random, cold = runs / "random", runs / "cold"
    other = tmp_path / "data"
    pack(open_source("digits", 8), str(other), shard_size=500)
    for name, args, code, words in [
        ("sample", ["--weights", random, "--method", "cold"], 2, "needs process.bnr cold"),
        ("sample", ["--weights", cold, "--bnr", 0.5], 2, "no meaning"),
        ("sample", ["--weights", random, "--set", "process.bnr=1"], 2, "only sampler.* can change"),
        ("sample", ["--weights", random, "--set", "sampler.etta=1"], 2, "did you mean 'sampler.eta'"),
        ("sample", ["--weights", random, "--method", "euler"], 2, "sampler.method"),
        ("sample", ["--weights", random, "--method", "heun", "--nfe", 4], 2, "an odd number"),
        ("sample", ["--weights", random, "--set", "sampler.guidance=2", "--set", "sampler.guide=absent"], 4, "absent"),
        ("evaluate", [tmp_path, "--out", tmp_path / "e"], 2, "has no weights/ema.safetensors"),
        ("evaluate", [random, "--manifest", tmp_path / "none" / "manifest.parquet", "--out", tmp_path / "e"], 3, "none"),
        ("evaluate", [random, "--manifest", other / "manifest.parquet", "--out", tmp_path / "e"], 2, "made from data"),
        ("evaluate", [random, "--out", other / "manifest.parquet" / "e"], 8, "cannot be written (Not a directory)"),
        ("evaluate", [random, "--nfe", "9,many", "--out", tmp_path / "e"], 2, "needs numbers, such as 9,18,35"),
        ("evaluate", [random, "--blocks", 0, "--out", tmp_path / "e"], 2, "--blocks 0: needs a number from 1"),
        ("trajectory", [random, "--label", 10], 2, "from 0 to 9"),
        ("trajectory", [random, "--columns", 1], 2, "--columns 1: needs a number from 2"),
    ]:  # fmt: skip
        done = command(name, *args)
        assert (done.returncode, words in done.stderr) == (code, True), (name, args, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
