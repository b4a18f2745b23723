"""Two processes on one place: the second is refused by name, or the first stops; never both end well with mixed results."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.processes import wait_for
from tests.support.training import BATCH, ENDLESS, environment, finish, fork, outcome, reached
from tests.support.zygote import zygote
from warm_dist.files import claimed
from warm_dist.store.s3 import S3Store
from warm_dist.store.seaweedfs import S3Server


def test_two_runs_on_one_url(s3: S3Server, config_file: Path, tmp_path: Path) -> None:
    """Fault: each replaces the other's checkpoints in the store, and both end with 0."""
    url = f"s3://{s3.bucket}/two/{tmp_path.name}"
    there = (f"checkpoint.url={url}", f"checkpoint.endpoint_url={s3.endpoint_url}")
    first = fork(config_file, tmp_path / "a", ENDLESS, *there)
    try:
        wait_for("a checkpoint", lambda: reached(tmp_path / "a") >= 4 * BATCH or first.poll() is not None)
        code, _, err = finish(fork(config_file, tmp_path / "b", *there))
        assert code == 8
        assert f"{url}: in use by run {tmp_path}/a (process {first.pid} on " in err
        assert first.poll() is None
    finally:
        first.terminate()
        code, _, err = finish(first)
    assert code == 75, err
    store = S3Store(s3.bucket, f"two/{tmp_path.name}", s3.endpoint_url)
    assert b'"released": true' in store.read("owner.json")
    code, _, err = finish(fork(config_file, tmp_path / "b", f"train.total_nimg={8 * 10**6}", "train.seed=1", *there))
    assert code == 4, "the store's checkpoints are another run's"
    assert "train.seed" in err


def test_checkpoints_do_not_go_into_a_run_s_folder(config_file: Path, tmp_path: Path) -> None:
    """Fault: the run goes on from the other one's checkpoints, and its own are among them."""
    code, _, err = finish(fork(config_file, tmp_path / "a"))
    assert code == 0, err
    before = sorted(tmp_path.joinpath("a").rglob("*"))
    code, _, err = finish(fork(config_file, tmp_path / "b", f"checkpoint.url={tmp_path}/a"))
    assert code == 2
    assert f"checkpoint.url {tmp_path}/a: is the folder of a run" in err
    assert sorted(tmp_path.joinpath("a").rglob("*")) == before
    code, _, err = finish(fork(config_file, tmp_path / "b", f"checkpoint.url={tmp_path}/b/../b/copies"))
    assert code == 2
    assert "is in output, the run's own folder" in err
    published = tmp_path / "published"  # as a sweep keeps a trial: its files beside its checkpoints
    published.mkdir()
    shutil.copy(tmp_path / "a" / "run.json", published)
    code, _, err = finish(fork(config_file, tmp_path / "b", f"checkpoint.url={published}"))
    assert code == 0, err


def test_a_folder_that_is_taken_from_under_a_run(config_file: Path, tmp_path: Path) -> None:
    """Fault: the folder of a live run is removed, a second run starts in it, and both end with 0 and mixed results."""
    run = tmp_path / "run"
    first = fork(config_file, run, ENDLESS)
    wait_for("steps", lambda: reached(run) >= 4 * BATCH or first.poll() is not None)
    run.rename(tmp_path / "removed")  # at once: the heartbeat writes meanwhile
    shutil.rmtree(tmp_path / "removed")
    code, _, err = finish(fork(config_file, run))
    assert code == 0, err
    code, _, err = finish(first)
    assert code == 8
    assert f"{run}: was removed or replaced while this run trained in it" in err
    assert outcome(run)["code"] == 0


def test_two_evaluations_on_one_folder(tmp_path: Path) -> None:
    """Fault: four of eight results are lost, and both commands end with 0."""
    with claimed(tmp_path / "out", "evaluation"):
        words = [str(ROOT / "launch" / "evaluate.py"), "nothing", "--out", str(tmp_path / "out")]
        code, _, err = finish(zygote().start(*words, env=environment()))
    assert (code, "another evaluation is using it" in err) == (8, True), err
