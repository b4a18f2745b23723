"""What people read after a mistake: the whole message and the exit code of each.

A message names the key, flag or file, the value seen, what is legal, and what to do. No library's own words, no traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines import index, info, verify
from data_pipelines.pack import main as pack_main
from data_pipelines.reading.loader import open_loader
from launch import ema, evaluate, export, mirror, report, sample, spectrum, sweep, train, trajectory
from tests.support.commands import call
from tests.support.packed import Packed
from warm_dist.config.run import load_config
from warm_dist.errors import WarmDistError

CONFIG = {
    "output": "run",
    "engine": "local",
    "data": {"manifest": "d8/manifest.parquet", "resolution": 8, "channels": 1, "num_classes": 10, "num_lanes": 16},
    "process": {"bnr": 0.5},
    "network": {
        "arch": "ddpmpp",
        "channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attention_resolutions": [4],
    },
    "train": {
        "total_nimg": 320,
        "batch_size": 16,
        "lr": 0.001,
        "ema_half_life_nimg": 400,
        "log_nimg": 80,
        "save_nimg": 160,
    },
    "sampler": {"num_steps": 4},
    "eval": {"eval_nimg": 320, "num_images": 64, "extractor": "pixels"},
}
SWEEP = {"base": "c.json", "output": "sweep", "space": {"train.lr": {"grid": [0.1, 0.2]}}}


@pytest.fixture(scope="module")
def place(digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a config, a data set, and things that are neither."""
    folder = tmp_path_factory.mktemp("messages")
    (folder / "d8").symlink_to(digits.url)
    (folder / "folder").mkdir()
    texts = {"c.json": json.dumps(CONFIG), "empty.json": "", "list.json": "[]", "twice.json": '{"a": 1, "a": 2}',
             "half.json": '{"a": ', "folder/x.txt": "hello", "x.safetensors": "hello", "n.json": '{"a": NaN}'}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.json").write_bytes(b"\xff\xfe\0")
    return folder


def told(action: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(WarmDistError) as caught:
        action()
    return caught.value.exit_code, str(caught.value)


SETS: list[tuple[str, int, str]] = [
    ("lr=0.1", 2, "--set lr: unknown key 'lr'; did you mean 'train.lr'?"),
    ("learning_rate=1", 2, "--set learning_rate: unknown key 'learning_rate'; did you mean 'train.lr'?"),
    (
        "train.learning_rate=1",
        2,
        "--set train.learning_rate: unknown key 'train.learning_rate'; did you mean 'train.lr'?",
    ),
    ("epochs=3", 2, "--set epochs: unknown key 'epochs'; did you mean 'train.total_nimg'?"),
    ("train.batch=4", 2, "--set train.batch: unknown key 'train.batch'; did you mean 'train.batch_size'?"),
    ("train.batchsize=32", 2, "--set train.batchsize: unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
    ("trian=1", 2, "--set trian: unknown key 'trian'; did you mean 'train'?"),
    (
        "tracking.run_name=20261127",
        2,
        "--set tracking.run_name: needs a text, got 20261127; a text of digits is written '\"20261127\"'",
    ),
    ("train.lr=fast", 2, '--set train.lr: needs a number, got "fast"'),
    ("train.lr=-1", 2, "--set train.lr: needs more than 0, got -1"),
    ("train.lr=1e300", 2, "--set train.lr: needs a size from 1e-15 to 1e15, whose square float32 can hold, got 1e+300"),
    ("train.betas=[0.9,0.9,0.9]", 2, "--set train.betas: needs a list of 2, got [0.9, 0.9, 0.9]"),
    ('output="a\\ud800"', 2, "--set output: needs Unicode text, got 'a\\ud800'"),
    ("output=", 2, '--set output: needs a folder, file or URL, not an empty text, got ""'),
    ("tracking.prometheus_host=", 2, '--set tracking.prometheus_host: needs a text that is not empty, got ""'),
    ("train.batch_size=1.5", 2, "--set train.batch_size: needs a whole number, got 1.5"),
    ("train.batch_size=true", 2, "--set train.batch_size: needs a whole number, got true"),
    ("train.batch_size=", 2, '--set train.batch_size: needs a whole number, got ""'),
    ("train.batch_size=null", 2, "--set train.batch_size: needs a whole number, got null"),
    ("train=3", 2, "--set train: needs an object, a section of keys, got 3"),
    ("network.arch=unet", 2, "--set network.arch: needs 'ddpmpp', 'ncsnpp' or 'adm', got \"unet\""),
    ("network.channels=7", 2, "--set network.channels: network.channels must be even and at least 4, is 7"),
    ("network.channel_mult=2", 2, "--set network.channel_mult: needs a list, got 2"),
    ("network.channel_mult=[]", 2, "--set network.channel_mult: needs a list of 1 or more, got []"),
    (
        "network.channel_mult=[1,-2]",
        2,
        "--set network.channel_mult: 'network.channel_mult.1': needs more than 0, got -2",
    ),
    (
        "network.attention_resolutions=[5]",
        2,
        "--set network.attention_resolutions: network.attention_resolutions has 5; the network works at [8, 4]",
    ),
    ("process.bnr=-1", 2, "--set process.bnr: needs 0 or more, got -1"),
    (
        'process.bnr={"kind":"wat"}',
        2,
        "--set process.bnr: needs a number, or an object whose kind is 'number', 'power', 'table', 'uniform', 'log_uniform', 'cold', got {\"kind\": \"wat\"}",
    ),
    (
        'process.bnr={"kind":"uniform"}',
        2,
        "--set process.bnr: missing key 'process.bnr.low'\n  --set process.bnr: missing key 'process.bnr.high'",
    ),
    (
        'process.bnr={"kind":"uniform","low":2,"high":1}',
        2,
        "--set process.bnr: the low end 2 must be below the high end 1",
    ),
    ("process.sigma_data=big", 2, "--set process.sigma_data: needs 'measured', or a number, got \"big\""),
    ("sampler.grid=edmm", 2, "--set sampler.grid: needs 'edm' or 'log_linear', got \"edmm\""),
    (
        "sampler.grid=[1e300,1e-320]",
        2,
        "--set sampler.grid: 'sampler.grid.0': needs a size from 1e-15 to 1e15, whose square float32 can hold, got 1e+300\n  --set sampler.grid: 'sampler.grid.1': needs a size from 1e-15 to 1e15, whose square float32 can hold, got 1e-320",
    ),
    ("sampler.grid=[2,1]", 2, "--set sampler.grid: grid has 2 entries, num_steps is 4"),
    (
        "sampler.method=euler",
        2,
        "--set sampler.method: needs 'heun', 'first_order', 'multistep', 'churn', 'ancestral' or 'cold', got \"euler\"",
    ),
    ("sampler.eta=2", 2, "--set sampler.eta: needs 1 or less, got 2"),
    (
        "sampler.guidance=2",
        2,
        "--set sampler.guidance: sampler.guidance needs sampler.guide (a weaker network's weights), or a network also trained without classes: data.num_classes and train.label_dropout above 0",
    ),
    ("sampler.sigma_min=100", 2, "--set sampler.sigma_min: sigma_min 100 must be below sigma_max 80"),
    ("parallel.zero_stage=4", 2, "--set parallel.zero_stage: needs 0, 1, 2 or 3, got 4"),
    ("parallel.zero_stage=true", 2, "--set parallel.zero_stage: needs a whole number, got true"),
    ("parallel.precision=fp16", 2, "--set parallel.precision: needs 'fp32' or 'bf16', got \"fp16\""),
    ("parallel.timeout_s=0", 2, "--set parallel.timeout_s: needs more than 0, got 0"),
    ("data.num_lanes=7", 2, "--set data.num_lanes: train.batch_size 16 is not a multiple of data.num_lanes 7"),
    ("data.manifest=3", 2, "--set data.manifest: needs a text, got 3; a text of digits is written '\"3\"'"),
    ("output=null", 2, "--set output: needs a text, got null"),
    (
        "train.total_nimg=321",
        2,
        "--set train.total_nimg: train.total_nimg 321 is not a multiple of train.batch_size 16",
    ),
    ("train.ema_lengths=[1]", 2, "--set train.ema_lengths: 'train.ema_lengths.0': needs 0.25 or less, got 1"),
    ("train.ema_lengths=[0.1,0.1]", 2, "--set train.ema_lengths: train.ema_lengths names a length twice"),
    ("train.betas=[0.9]", 2, "--set train.betas: needs this entry of the list too"),
    ("train.seed=-1", 2, "--set train.seed: needs 0 or more, got -1"),
    (
        "train.seed=999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999",
        2,
        "--set train.seed: 999999999999999999999999999999… is no number here; it must be finite and of 100 digits or fewer",
    ),
    (
        "eval.extractor=inception",
        2,
        "--set eval.extractor: extractor 'inception' needs eval.extractor_url and eval.extractor_sha256",
    ),
    ("eval.extractor_sha256=zz", 2, '--set eval.extractor_sha256: needs a sha256, 64 hex digits, got "zz"'),
    (
        "tracking.mlflow_url=http://a b",
        2,
        '--set tracking.mlflow_url: needs the URL of a server, http://… or https://…, got "http://a b"',
    ),
    (
        "tracking.registered_model=bad/name:x",
        2,
        '--set tracking.registered_model: needs a name without / and :, got "bad/name:x"',
    ),
    (
        "tracking.mlflow_url=localhost:5000",
        2,
        '--set tracking.mlflow_url: needs the URL of a server, http://… or https://…, got "localhost:5000"',
    ),
    ("tracking.prometheus_port=70000", 2, "--set tracking.prometheus_port: needs less than 65536, got 70000"),
    ("train.lr.x=1", 2, "--set 'train.lr.x=1': 'lr' is not a section"),
    ("train..lr=1", 2, "--set 'train..lr=1': needs the form a.b=VALUE"),
    ("nonsense", 2, "--set 'nonsense': needs the form a.b=VALUE"),
    ("process.bnr=NaN", 2, "--set process.bnr: NaN is no number here; it must be finite and of 100 digits or fewer"),
]


@pytest.mark.parametrize(("setting", "code", "message"), SETS)
def test_a_setting(place: Path, monkeypatch: pytest.MonkeyPatch, setting: str, code: int, message: str) -> None:
    monkeypatch.chdir(place)
    assert told(lambda: load_config("c.json", [setting])) == (code, message)


DATA: list[tuple[str, int, str]] = [
    ("data.manifest=none/manifest.parquet", 3, "none/manifest.parquet: does not exist"),
    (
        "data.manifest=d8",
        3,
        "d8: cannot be read (not a regular file); name the data set's manifest itself, d8/manifest.parquet",
    ),
    (
        "data.manifest=folder/x.txt",
        3,
        "folder/x.txt: is not a readable Parquet file (Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)); name a manifest.parquet",
    ),
    (
        "data.manifest=s3://your-bucket/x/manifest.parquet",
        2,
        "s3://your-bucket is a placeholder; set data.manifest and all other s3:// URLs to your own",
    ),
    (
        "data.manifest=ftp://a/manifest.parquet",
        2,
        '--set data.manifest: needs s3://bucket/prefix or a path on this machine, got "ftp://a/manifest.parquet"',
    ),
    (
        "data.endpoint_url=http://127.0.0.1:99999",
        2,
        '--set data.endpoint_url: needs the URL of a server, http://… or https://…, got "http://127.0.0.1:99999"',
    ),
    ("data.resolution=16", 2, "data.resolution is 16, d8/manifest.parquet has 8; set data.resolution to 8"),
    ("data.channels=3", 2, "data.channels is 3, d8/manifest.parquet has 1; set data.channels to 1"),
    ("data.num_classes=3", 2, "data.num_classes is 3, d8/manifest.parquet has 10; set data.num_classes to 10"),
]


@pytest.mark.parametrize(("setting", "code", "message"), DATA)
def test_data(place: Path, monkeypatch: pytest.MonkeyPatch, setting: str, code: int, message: str) -> None:
    monkeypatch.chdir(place)
    settings = [setting, *(["network.attention_resolutions=[]"] if "resolution" in setting else [])]
    assert told(lambda: open_loader(load_config("c.json", settings), 0, 1)) == (code, message)


SWEEPS: list[tuple[str, int, str]] = [
    (
        '{"set": {"train.lr": 1.0}}',
        2,
        "s.json: set: 'train.lr' is set for all trials and searched in space ('train.lr'); remove one of them",
    ),
    ('{"space": {"train.lrr": {"grid": [1]}}}', 2, "trial lrr=1: unknown key 'train.lrr'; did you mean 'train.lr'?"),
    ('{"space": {"train.lr": {"grid": ["a"]}}}', 2, "trial lr=a: 'train.lr': needs a number, got \"a\""),
    (
        '{"space": {"train.lr": {}}}',
        2,
        "s.json: 'space.train.lr': needs exactly one of grid, choice, uniform, log_uniform; has none",
    ),
    ('{"space": {"train.seed": {"grid": [1]}}}', 2, "s.json: space: train.seed is set by the sweep's list seeds"),
    (
        '{"space": {"output": {"grid": ["a"]}}}',
        2,
        "s.json: space: 'output' cannot be searched; the sweep sets it, or the network is the same",
    ),
    (
        '{"space": {"train": {"grid": [1]}}}',
        2,
        "s.json: space: 'train' is a section: name one of its keys, such as 'train.seed'",
    ),
    ('{"set": {"train.lrr": 1}, "space": {}}', 2, "s.json: set: unknown key 'train.lrr'; did you mean 'train.lr'?"),
    (
        '{"space": {"train.lr": {"uniform": [0.1, 1]}}, "num_samples": 20000}',
        2,
        "s.json: num_samples 20,000 make 20,000 trials; a sweep has at most 10,000",
    ),
    ('{"base": "s.json"}', 2, "s.json: base s.json is a sweep's config; name a run's, such as quickstart.json"),
    ('{"base": "none.json"}', 2, "none.json: does not exist; name a config file, such as configs/quickstart.json"),
    ('{"output": "s3:/x"}', 2, "s.json: 'output': needs s3://bucket/prefix or a path on this machine, got \"s3:/x\""),
    ('{"seeds": [1, 1]}', 2, "s.json: seeds has a duplicate"),
    (
        '{"scheduler": {"kind": "pbt"}}',
        2,
        "s.json: 'scheduler.kind': needs 'asha', got \"pbt\"\n  s.json: missing key 'scheduler.grace_nimg'",
    ),
    ('{"spce": {}}', 2, "s.json: unknown key 'spce'; did you mean 'space'?"),
]


@pytest.mark.parametrize(("changes", "code", "message"), SWEEPS)
def test_a_sweep(place: Path, monkeypatch: pytest.MonkeyPatch, changes: str, code: int, message: str) -> None:
    monkeypatch.chdir(place)
    Path("s.json").write_text(json.dumps(SWEEP | json.loads(changes)))
    assert told(lambda: call(sweep.main, "--config", "s.json", "--dry-run")) == (code, message)


MAINS: dict[str, Callable[[], int]] = {
    "train": train.main, "evaluate": evaluate.main, "sample": sample.main, "export": export.main, "ema": ema.main,
    "report": report.main, "mirror": mirror.main, "info": info.main, "verify": verify.main, "index": index.main,
    "pack": pack_main, "spectrum": spectrum.main, "trajectory": trajectory.main,
}  # fmt: skip
COMMANDS: list[tuple[str, int, str]] = [
    ("train --config none.json", 2, "none.json: does not exist; name a config file, such as configs/quickstart.json"),
    ("train --config folder", 2, "folder: cannot be read (Is a directory); name a config file"),
    ("train --config empty.json", 2, "empty.json: not JSON, line 1 column 1: Expecting value"),
    ("train --config half.json", 2, "half.json: not JSON, line 1 column 7: Expecting value"),
    ("train --config list.json", 2, "list.json: holds a list, needs an object"),
    ("train --config twice.json", 2, "twice.json: the key 'a' appears twice in one object"),
    ("train --config binary.json", 2, "binary.json: is not UTF-8 text, so it is not JSON; name a config file"),
    ("train --config n.json", 2, "n.json: NaN is no number here; it must be finite and of 100 digits or fewer"),
    (
        "train --config c.json --dry-run --world-size 3",
        9,
        "3 processes cannot share train.batch_size 16 in data.num_lanes 16 lanes; valid world sizes: 1, 2, 4, 8, 16",
    ),
    ("evaluate none --nfe x", 2, "--nfe x: needs numbers, such as 9,18,35"),
    ("evaluate none --bnr -1", 2, "--bnr -1: needs 0 or a number from 1e-15 to 1e15"),
    ("evaluate none --blocks 0", 2, "--blocks 0: needs a number from 1 to 2147483647"),
    (
        "evaluate none --mlflow-url localhost",
        2,
        "--mlflow-url localhost: needs the URL of a server, http://… or https://…",
    ),
    (
        "sample --weights none",
        2,
        "none: does not exist; name a finished run's folder, a checkpoint in it (RUN/checkpoints/NIMG), or a file of launch/export.py",
    ),
    (
        "sample --weights folder",
        2,
        "folder: has no weights/ema.safetensors, which a run writes at its end; name a finished run's folder, a checkpoint in it (RUN/checkpoints/NIMG), or a file of launch/export.py",
    ),
    (
        "sample --weights x.safetensors",
        4,
        "x.safetensors: not a safetensors file (Error while deserializing header: header too small); name a file of launch/export.py",
    ),
    ("sample --weights none --n 0", 2, "--n 0: needs a number from 1 to 2147483647"),
    (
        "sample --weights none --n 100000000000000000000000",
        2,
        "--n 100000000000000000000000: needs a number from 1 to 2147483647",
    ),
    ("mirror folder --url http://", 2, "--url http://: needs the URL of a server, http://… or https://…"),
    ("mirror folder --url http://h:99999", 2, "--url http://h:99999: needs the URL of a server, http://… or https://…"),
    ("mirror folder --register a/b:c", 2, '--register "a/b:c": needs a name without / and :'),
    (
        "evaluate w --mlflow-url http://[::1",
        2,
        "--mlflow-url http://[::1: needs the URL of a server, http://… or https://…",
    ),
    ("spectrum m --mlflow-url x", 2, "--mlflow-url x: needs the URL of a server, http://… or https://…"),
    ("trajectory w --n 101", 2, "--n 101: needs a number from 1 to 100"),
    ("trajectory w --columns 101", 2, "--columns 101: needs a number from 2 to 100"),
    ("sample --weights none --out a.gif", 2, "--out a.gif: needs a name that ends in .png or .npy"),
    ("export none", 2, "none: is no folder; name a run's, or the s3:// URL of its checkpoint.url"),
    (
        "export folder",
        4,
        "folder: has no complete checkpoint; name a run's folder, or the s3:// URL of its checkpoint.url",
    ),
    ("ema none --length 0.1", 2, "none: is no folder; name a run's, or the s3:// URL of its checkpoint.url"),
    ("ema folder --length 0.1", 4, "folder: no snapshots; set train.ema_lengths=[0.05,0.1] and train.snapshot_nimg"),
    (
        "report none",
        2,
        "none: not a run, its config.json is missing, unreadable or changed; give the output folder of a run",
    ),
    (
        "mirror none",
        2,
        "none: its config.json is missing, unreadable or changed; RUN is the folder that the config calls output",
    ),
    ("info none/manifest.parquet", 3, "none/manifest.parquet: does not exist"),
    ("info d8", 3, "d8: cannot be read (not a regular file); name the data set's manifest itself, d8/manifest.parquet"),
    (
        "verify folder/x.txt",
        3,
        "folder/x.txt: is not a readable Parquet file (Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)); name a manifest.parquet",
    ),
    ("index folder", 3, "folder: has no .tar shards; name the folder or prefix that holds them"),
    (
        "pack none out --resolution 8",
        2,
        "none: no such source; give 'openmoji', 'digits', a folder of images, a .zip, .tar or .parquet file, or CIFAR's .tar.gz",
    ),
    ("pack folder out --resolution 8", 3, "folder: no images; left out: no pictures: 1 (1 .txt; such as 'x.txt')"),
    ("pack digits out --resolution 0", 2, "resolution 0, resize 'box': needs 1 to 2048, and one of box, lanczos, adm"),
    (
        "info d8/x.parquet",
        3,
        "d8/x.parquet: does not exist; name the data set's manifest itself, d8/manifest.parquet",
    ),
    ("spectrum none", 3, "none: does not exist; name the data set's manifest itself, none/manifest.parquet"),
    (
        "trajectory none",
        2,
        "none: does not exist; name a finished run's folder, a checkpoint in it (RUN/checkpoints/NIMG), or a file of launch/export.py",
    ),
    ("trajectory none --columns 1", 2, "--columns 1: needs a number from 2 to 100"),
]


@pytest.mark.parametrize(("words", "code", "message"), COMMANDS)
def test_a_command(place: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, message: str) -> None:
    monkeypatch.chdir(place)
    command, *arguments = words.split()
    found, text = told(lambda: call(MAINS[command], *arguments))
    assert (found, text.replace(f"{place}/", "")) == (code, message)


def test_there_are_enough_of_them_and_none_is_a_library_s() -> None:
    rows = SETS + DATA + SWEEPS + COMMANDS
    assert len({words for words, _, _ in rows}) == len(rows) >= 60
    for words, _, message in rows:
        assert "Errno" not in message, words
        assert "object at 0x" not in message, words
        assert "Input should" not in message, words
        for line in message.splitlines():
            unknown, _, near = line.partition("; did you mean ")
            assert not near or near.strip("'?") not in unknown.split("'"), words
