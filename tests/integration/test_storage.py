"""Checkpoints on a real S3: credentials and buckets, an outage in the middle of a run, the log beside them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.support.checkpoints import Fixture
from tests.support.patience import until
from tests.support.tiny_run import ALONE, BATCH, batches, config, info
from warm_dist.checkpoints import manager
from warm_dist.checkpoints.format import CHECKPOINTS, complete_names, nimg_of, open_saved
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.distributed.stop import StopSignal
from warm_dist.errors import AccessError, BucketError, ConfigError, Stopped
from warm_dist.store.open import open_store
from warm_dist.store.seaweedfs import S3Server
from warm_dist.training.state import load_state
from warm_dist.training.trainer import Trainer


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_bad_store_is_one_error_before_any_training(s3, tmp_path, said, monkeypatch):
    for url, error in (("s3://absent/a", BucketError), ("s3://your-bucket/a", ConfigError)):
        with pytest.raises(error):
            Fixture(tmp_path / "run", said, url=url, endpoint_url=s3.endpoint_url).restore()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError):
        Fixture(tmp_path / "run", said, url="s3://warm-dist/a", endpoint_url=s3.endpoint_url).restore()


@pytest.mark.parametrize("outage_s", [4, pytest.param(60, marks=pytest.mark.soak)])
def test_s3_down_during_a_checkpoint(tmp_path, said, monkeypatch, outage_s):
    """The server ends in mid-run and comes back: training goes on meanwhile, the checkpoint arrives, nothing is corrupt."""
    folder = tmp_path / "s3"
    with S3Server(folder, "warm-dist") as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        settings = config(
            tmp_path / "run", engine="local", train__total_nimg=BATCH * 100_000, train__save_nimg=BATCH * 10,
            checkpoint__url="s3://warm-dist/run", checkpoint__endpoint_url=server.endpoint_url,
        )  # fmt: skip
        place = CheckpointManager(tmp_path / "run", ALONE, settings.checkpoint, said.append)
        trainer = Trainer(settings, ALONE, info(), said.append, place)
        trainer.restore()
        stop, down, marks = StopSignal(), [True], {}
        step, begun = trainer.step, []

        def watched(data: Any) -> Any:
            if trainer.nimg == BATCH * 15:  # the first checkpoint is sent, the second is to come
                until(lambda: not place.uploads.pending())
                server.__exit__()
                begun.append(time.monotonic())
            if begun and down and time.monotonic() > begun[0] + outage_s:
                marks["back"] = trainer.nimg
                down.clear()
                again = S3Server(folder, "warm-dist", port).__enter__()
                server._stack = again._stack  # to be closed by the with above
            if not down and trainer.nimg == trainer.saved_nimg + BATCH * 5 and "end" not in marks:
                until(lambda: not place.uploads.pending())
                marks["end"] = trainer.saved_nimg
                stop.name = "TEST"
            return step(data)

        trainer.step = watched  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            trainer.fit(batches(ALONE, 0), None, stop, None, set())
        assert marks["back"] > BATCH * 20  # it went on while there was no server, past the next save
        assert place.close(60) == []
        store = open_store("s3://warm-dist/run", server.endpoint_url)
        names = complete_names(store, CHECKPOINTS)
        assert nimg_of(names[-1]) == trainer.nimg
        fresh = CheckpointManager(tmp_path / "fresh", ALONE, settings.checkpoint, said.append)
        other = Trainer(settings, ALONE, info(), said.append, fresh)
        other.restore()
        assert other.nimg == trainer.nimg
        for a, b in zip(trainer.engine.shard(), other.engine.shard(), strict=True):
            assert all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("master", "exp_avg", "exp_avg_sq"))
        for name in names:  # whatever is complete is whole
            load_state(open_saved(store, name), 0, other.engine, other.emas)
        assert fresh.close(60) == []


def test_a_log_that_grows_or_is_refused_fails_no_checkpoint(tmp_path, said, s3, monkeypatch):
    from warm_dist.runs.metrics import MetricsLog

    mine = Fixture(tmp_path / "run", said, url=f"s3://{s3.bucket}/{tmp_path.name}", endpoint_url=s3.endpoint_url)
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", 1)
    log.write(8, "train", loss=1.0)
    write = type(mine.storage.remote).write

    def grows(store, path, data):
        if path == manager.METRICS:
            log.write(16, "train", loss=1.0)
        write(store, path, data)

    monkeypatch.setattr(type(mine.storage.remote), "write", grows)
    mine.save(8)
    deadline = time.monotonic() + 20
    while mine.storage.uploads.pending() and time.monotonic() < deadline:
        time.sleep(0.02)

    def refused(store, path, data):
        if path == manager.METRICS:
            raise AccessError("not this one")
        write(store, path, data)

    monkeypatch.setattr(type(mine.storage.remote), "write", refused)
    mine.save(16)
    assert mine.storage.close(60) == []
    assert [upload.error for upload in mine.storage.ended()] == [None, None]
    assert said == ["metrics.jsonl not sent: not this one"]
