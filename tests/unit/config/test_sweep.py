"""A sweep's JSON: what it may say, and what each mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from warm_dist.config.sweep import SweepConfig, load_sweep
from warm_dist.errors import ConfigError
from warm_dist.sweeps.trials import trials

SWEEPS = sorted(path for path in (ROOT / "configs").glob("sweep_*.json") if path.name != "sweep_schema.json")


def written(folder: Path, **changes: Any) -> Path:
    """A sweep's file beside a copy of the quickstart's config."""
    (folder / "quickstart.json").write_bytes((ROOT / "configs" / "quickstart.json").read_bytes())
    tree = {"base": "quickstart.json", "output": "out", "space": {"process.bnr": {"grid": [0, 0.5]}}} | changes
    path = folder / "sweep.json"
    path.write_text(json.dumps(tree))
    return path


def all_trials(path: Path, *overrides: str):
    return trials(*load_sweep(path, list(overrides)))


def test_the_promised_sweeps_are_there():
    assert {"sweep_quickstart", "sweep_smoke", "sweep_bnr", "sweep_schedule_imagenet64"} <= {
        path.stem for path in SWEEPS
    }


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_in_configs_is_whole(path):
    """Fault: a key was renamed, and a shipped sweep still searches or sets it by its old name."""
    assert json.loads(path.read_text())["$schema"] == "sweep_schema.json"
    assert len(all_trials(path)) >= 4


def test_the_paper_s_table_3_is_the_bnr_sweep():
    found = all_trials(ROOT / "configs" / "sweep_bnr.json")
    assert [(t.values["process.bnr"], t.seed) for t in found] == [
        (bnr, seed) for seed in (0, 1, 2) for bnr in (0, 0.1, 0.3, 0.5, 0.65, 1, 2, 10)
    ]


def test_the_schema_is_the_generated_one():
    kept = json.loads((ROOT / "configs" / "sweep_schema.json").read_text())
    assert kept == SweepConfig.model_json_schema(by_alias=True), (
        "run: python -m warm_dist.config sweep > configs/sweep_schema.json"
    )


def test_overrides_go_to_the_sweep_or_to_its_trials(tmp_path):
    sweep, base, _ = load_sweep(written(tmp_path), ["output=elsewhere", "trial.max_failures=0", "train.lr=0.5"])
    assert (sweep.output, sweep.trial.max_failures, base["train"]["lr"]) == ("elsewhere", 0, 0.5)
    assert base["output"] == "runs/quickstart"


def test_set_changes_the_base_and_the_command_line_has_the_last_word(tmp_path):
    path = written(tmp_path, set={"train.lr": 0.25, "eval.grid": 4})
    assert {t.config.train.lr for t in all_trials(path)} == {0.25}
    assert {(t.config.train.lr, t.config.eval.grid) for t in all_trials(path, "train.lr=0.125")} == {(0.125, 4)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": "s3://u:p/w@bucket/x"}, "'output': .*"),
        ({"endpoint_url": "http://u:p@h"}, "'endpoint_url': holds a user.*got \"http://h\""),
        ({"ray_address": "ray://u:p@h:10001"}, "'ray_address': holds a user.*got \"ray://h:10001\""),
        ({"spce": {}}, "unknown key 'spce'; did you mean 'space'"),
        ({"space": {"train.lrr": {"grid": [1]}}}, "trial lrr=1: unknown key 'train.lrr'; did you mean 'train.lr'"),
        ({"space": {"train.lr": {"grid": [0.1, -1]}}}, "trial lr=-1: 'train.lr': needs more than 0, got -1"),
        ({"space": {"train.lr": {"grid": ["a"]}}}, "'train.lr': needs a number"),
        ({"space": {"train.lr": {"grid": []}}}, "needs a list of 1 or more"),
        ({"space": {"train.lr": {}}}, "needs exactly one of grid, choice, uniform, log_uniform; has none"),
        ({"space": {"train.lr": {"grid": [1], "choice": [2]}}}, "exactly one"),
        ({"space": {"train.lr": {"range": [1, 2]}}}, "unknown key 'space.train.lr.range'"),
        ({"space": {"train.lr": {"uniform": [2, 1]}}}, "the low end 2 must be below the high end 1"),
        ({"space": {"train.lr": {"log_uniform": [0, 1]}}}, "log_uniform needs a low end above 0"),
        ({"space": {"train": {"grid": [1]}}}, "'train' is a section: name one of its keys"),
        ({"set": {"train": {"lr": 1}}}, "'train' is a section: name one of its keys"),
        ({"space": {"process.bnr.cap": {"grid": [1]}}}, "'bnr' is not a section"),
        ({"space": {"train.seed": {"grid": [1, 2]}}}, "train.seed is set by the sweep's list seeds"),
        ({"space": {"output": {"grid": ["a", "b"]}}}, "'output' cannot be searched"),
        ({"space": {"tracking.experiment": {"grid": ["a", "b"]}}}, "'tracking.experiment' cannot be searched"),
        ({"space": {"eval.num_images": {"grid": [100, 200]}}}, "cannot be compared"),
        ({"space": {"network.channels": {"uniform": [8, 40]}}}, "'network.channels': needs a whole number"),
        ({"space": {"process.bnr": {"grid": [0.5, 0.5]}}}, "come twice"),
        ({"space": {"process.bnr": {"grid": [{"kind": "log_uniform", "low": 0.1, "high": 1}]}}}, "sampler.bnr is needed"),
        ({"set": {"train.seed": 5}}, "sweep.json: set: use the sweep's list seeds for train.seed"),
        ({"space": {"data.reader_threads": {"grid": [1, 2]}}}, "the network does not depend on it"),
        ({"space": {"process.bnr.cap": {"grid": [1]}, "process.bnr": {"grid": [{"kind": "power", "bnr": 1, "exponent": 0}]}}},
         "'process.bnr.cap' is inside 'process.bnr'"),
        ({"output": ""}, "'output'"),
        ({"output": "s3://"}, "'output'"),
        ({"output": "s3:/bucket"}, "'output'"),
        ({"output": "ftp://host/folder"}, "'output'"),
        ({"seeds": []}, "'seeds': needs a list of 1 or more"),
        ({"seeds": [1, 1]}, "seeds has a duplicate"),
        ({"seeds": [-1]}, "needs 0 or more"),
        ({"num_samples": 3}, "num_samples 3 needs a key of space that is drawn"),
        ({"scheduler": {"kind": "asha", "grace_nimg": 44800}}, "grace_nimg 44800 must be at least .* below train.total_nimg"),
        ({"scheduler": {"kind": "asha", "grace_nimg": 32}}, "grace_nimg 32 must be at least eval.eval_nimg 44800"),
        ({"scheduler": {"kind": "asha", "grace_nimg": 44800, "reduction_factor": 1}}, "needs 1.1 or more"),
        ({"scheduler": {"kind": "pbt"}}, "'scheduler.kind'"),
        ({"trial": {"gpus_per_process": 2}}, "gpus_per_process must be 0 or 1, or a fraction"),
        ({"trial": {"gpus_per_process": 0.5, "processes_per_node": 2}}, "a fraction for a trial of one process"),
        ({"set": {"eval": None}}, "sweep.json: set: a sweep ranks by the Fréchet distance, so it needs the section eval"),
        ({"set": {"train": None}}, "sweep.json: set: 'train' is a section"),
        ({"set": {"train": 5}}, "sweep.json: set: 'train' is a section"),
        ({"set": {"train.nope": 1}}, "sweep.json: set: unknown key 'train.nope'"),
        ({"set": {"train.lr": "abc"}}, "sweep.json: set: 'train.lr': needs a number, got \"abc\""),
        ({"set": {"train.batch_size": 7}}, "sweep.json: set: train.batch_size 7 is not a multiple of data.num_lanes 32"),
        ({"set": {"trian.lr": 1}}, "sweep.json: set: unknown key 'trian'; did you mean 'train'?"),
        ({"space": {"train.batch_size": {"grid": [7]}}}, "trial batch_size=7: train.batch_size 7 is not a multiple of data.num_lanes 32"),
        ({"space": {"train.lr": {"grid": [0.1] * 200}, "process.bnr": {"grid": [1] * 51}}},
         "sweep.json: space.train.lr.grid 200 x space.process.bnr.grid 51 make 10,200 trials; a sweep has at most 10,000"),
        ({"space": {"train.lr": {"uniform": [0.1, 0.2]}}, "num_samples": 10**9, "seeds": [0, 1]},
         "sweep.json: seeds 2 x num_samples 1,000,000,000 make 2,000,000,000 trials"),
        ({"set": {"output": "x"}}, "sweep.json: set: 'output' cannot be set for all trials"),
        ({"set": {"checkpoint.url": "s3://a/b"}}, "sweep.json: set: 'checkpoint.url' cannot be set for all trials"),
        ({"set": {"tracking.prometheus_port": 9000}}, "'tracking.prometheus_port' cannot be set for all trials"),
        ({"surface": {"nfe": [1, 1]}}, "'surface': nfe has a duplicate"),
        ({"surface": {"nfe": [1], "bnr": [0.5, 0.5]}}, "'surface': bnr has a duplicate"),
        ({"registered_model": ""}, "'registered_model': needs a name without / and :, got \"\""),
        ({"base": "sweep.json"}, "sweep.json: base sweep.json is a sweep's config; name a run's"),
        ({"base": "nowhere.json"}, "nowhere.json: does not exist"),
        ({"base": None}, "'base': needs a text"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_error(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        all_trials(written(tmp_path, **changes))


def test_a_seed_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^--set train\.seed: use the sweep's list seeds"):
        all_trials(written(tmp_path), "train.seed=3")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("space=3", "--set space: needs an object, a section of keys, got 3"),
        ("trial.max_failures=-1", "--set trial.max_failures: needs 0 or more, got -1"),
        ("num_samples=4", "--set num_samples: num_samples 4 needs a key of space that is drawn; all are on a grid"),
        ("train.lr=abc", "--set train.lr: needs a number, got \"abc\""),
        ("train.batch_size=30", "--set train.batch_size: train.batch_size 30 is not a multiple of data.num_lanes 32"),
        ("trian.lr=3", "--set trian.lr: unknown key 'trian'; did you mean 'train'?"),
        ("checkpoint.url=s3://a/b", "--set checkpoint.url: 'checkpoint.url' cannot be set for all trials; the sweep gives each its own"),
        ("eval=null", "--set eval: a sweep ranks by the Fréchet distance, so it needs the section eval"),
        ("process.bnr=1", "--set process.bnr: 'process.bnr' is set for all trials and searched in space ('process.bnr'); remove one of them"),
    ],
)  # fmt: skip
def test_an_override_is_blamed_for_its_own_mistake(tmp_path, override, told):
    """Fault: the file is named, which says nothing of the kind."""
    path = written(tmp_path, space={"process.bnr": {"grid": [0.5, 1]}}, seeds=[0])
    with pytest.raises(ConfigError) as caught:
        all_trials(path, override)
    assert str(caught.value) == told


@pytest.mark.parametrize("output", ["runs/a", "/x/y/", "s3://bucket", "s3://bucket/a/b/"])
def test_outputs_that_can_be(tmp_path, output):
    """Fault: the pattern that refuses 's3:/bucket' also refuses a bare bucket or a trailing slash."""
    assert load_sweep(written(tmp_path, output=output))[0].output == output


def test_a_base_without_evaluation_is_refused(tmp_path):
    path = written(tmp_path)
    tree = json.loads((tmp_path / "quickstart.json").read_text())
    del tree["eval"]
    (tmp_path / "quickstart.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="a sweep ranks by the Fréchet distance"):
        all_trials(path)


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path):
    from warm_dist.errors import WorldSizeError

    for trial, factors in (
        ({"processes_per_node": 3}, ""),
        ({"processes_per_node": 3, "nodes": 3}, r"trial\.nodes x "),
    ):
        told = rf"sweep\.json: {factors}trial\.processes_per_node: \d processes cannot share"
        with pytest.raises(WorldSizeError, match=told):
            all_trials(written(tmp_path, trial=trial))


def test_nan_is_no_value(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("0.5", "NaN"))
    with pytest.raises(ConfigError, match="NaN is no number here"):
        all_trials(path)
