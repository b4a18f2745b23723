"""The exporter: what a reader gets over HTTP, and its port."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
import torch

from tests.support.tiny_run import BATCH, batches, config, info
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World
from warm_dist.errors import ConfigError, PortError
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.supervisor import free_port
from warm_dist.tracking.prometheus import Exporter
from warm_dist.training.trainer import Trainer


def test_the_newest_line_and_every_rank_are_read(tmp_path: Path) -> None:
    alone = World(0, 1, torch.device("cpu"), None)
    settings = config(tmp_path, engine="local", train__total_nimg=BATCH * 4, train__log_nimg=BATCH * 2)
    port = free_port()
    exporter = Exporter("127.0.0.1", port)
    log = MetricsLog(tmp_path / "metrics.jsonl", 1, exporter)
    Trainer(settings, alone, info(), print).fit(batches(alone, 0), log, StopSignal(), None, set())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    exporter.close()
    last = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"][-1]
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["warm_dist_train_loss"]) == last["loss"]
    assert float(values["warm_dist_train_nimg"]) == BATCH * 4
    assert float(values['warm_dist_rank_images_per_s{rank="0"}']) == pytest.approx(last["images_per_s"])
    assert 'warm_dist_rank_data_s{rank="0"}' in values


def test_a_port_in_use_is_one_error() -> None:
    port = free_port()
    first = Exporter("127.0.0.1", port)
    with pytest.raises(PortError, match="prometheus_port"):
        Exporter("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"tracking\.prometheus_host: '192\.0\.2\.1' is no address of this machine"):
        Exporter("192.0.2.1", port)
    first.close()
