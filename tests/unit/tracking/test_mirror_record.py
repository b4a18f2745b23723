"""The mirror's bookkeeping against a server in memory, which keeps a value twice if it is sent as two values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow  # noqa: F401  # runs uname when it is imported
import pytest

from warm_dist.errors import UnreachableError
from warm_dist.files import read_json, write_json
from warm_dist.runs.metrics import MetricsLog, parse_line
from warm_dist.tracking import follow
from warm_dist.tracking.client import RUN_TAG
from warm_dist.tracking.mirror import Mirror

Run = Callable[..., SimpleNamespace]


class Server:
    """An MLflow client and its server in one. away: nothing arrives; loses_reply: it arrives, and nobody hears of it."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.away = self.loses_reply = False
        self.batches = 0

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if self.away:
            raise ConnectionError("refused")
        self.batches += bool(metrics)
        data = self.runs[run_id].data
        for m in metrics:
            point = (m.step, m.value, m.timestamp)
            if point not in data.metrics.setdefault(m.key, []):
                data.metrics[m.key].append(point)
        data.params |= {p.key: p.value for p in params}
        data.tags |= {t.key: t.value for t in tags}
        if self.loses_reply and metrics:
            raise ConnectionError("reset")

    def create_run(self, experiment: str, start_time: int | None, run_name: str = "", tags: Any = ()) -> Any:
        info = SimpleNamespace(run_id=f"run{len(self.runs)}", start_time=start_time, status="RUNNING")
        self.runs[info.run_id] = SimpleNamespace(
            info=info, data=SimpleNamespace(metrics={}, params={}, tags=dict(tags))
        )
        return self.runs[info.run_id]

    def search_runs(self, experiments: Any, query: str, max_results: int) -> list[Any]:
        identity = query.rpartition("= ")[2].strip("'")
        return [run for run in self.runs.values() if run.data.tags.get(RUN_TAG) == identity]

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step, value=value) for step, value, _ in self.runs[run_id].data.metrics[key]]

    def delete_run(self, run_id: str) -> None:
        del self.runs[run_id]

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self.runs[run_id].info.status, self.runs[run_id].info.end_time = status, end_time

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name)

    def list_artifacts(self, *_: Any) -> list[Any]:
        return []

    def update_run(self, *_: Any, **__: Any) -> None: ...

    log_text = log_artifact = update_run

    def held(self) -> list[tuple[int, float]]:
        """(step, loss) of the one run there is; a value that was sent twice stands twice."""
        (run,) = self.runs.values()
        return [(step, value) for step, value, _ in sorted(run.data.metrics["train/loss"])]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    out = Server()
    monkeypatch.setattr("warm_dist.tracking.mirror.client_of", lambda url: out)
    return out


def log(run: Path, steps: range, attempt: int = 1, scale: float = 1.0) -> None:
    metrics = MetricsLog(run / "metrics.jsonl", attempt)
    for nimg in steps:
        metrics.write(nimg, "train", loss=scale / nimg)


def mirror(run: Path) -> Mirror:
    return Mirror(run, "http://127.0.0.1:1", "x")


def losses(steps: range, scale: float = 1.0) -> list[tuple[int, float]]:
    return [(n, scale / n) for n in steps]


def test_each_value_arrives_once_with_its_own_time(server: Server, tmp_path: Path) -> None:
    log(tmp_path, range(1, 5))
    one = mirror(tmp_path)
    assert [one.sync(running=True), one.sync(running=True)] == [4, 0]
    log(tmp_path, range(3, 9))  # a step that was logged again, after a stop say
    assert one.sync(running=True) == 4
    assert server.held() == losses(range(1, 9))
    first = parse_line((tmp_path / "metrics.jsonl").read_bytes().splitlines()[0])
    assert first is not None
    assert server.runs["run0"].data.metrics["train/loss"][0][2] == int(first["time"] * 1000)


def test_without_its_memory_the_server_is_asked(server: Server, tmp_path: Path) -> None:
    log(tmp_path, range(1, 5))
    mirror(tmp_path).sync(running=True)
    (tmp_path / "mirror.json").unlink()
    log(tmp_path, range(1, 9), attempt=2, scale=2.0)
    assert mirror(tmp_path).sync(running=True) == 4
    assert server.held() == losses(range(1, 5)) + losses(range(5, 9), 2.0)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_highest_attempt_s_value_is_shown(server: Server, tmp_path: Path, order: tuple[int, int]) -> None:
    """Wherever it stands: two processes may have written for a while, one of them already given up."""
    for attempt in order:
        log(tmp_path, range(1, 5), attempt, scale=float(attempt))
    mirror(tmp_path).sync(running=True)
    assert server.held() == losses(range(1, 5), 2.0)


def test_values_wait_while_the_server_is_away(server: Server, tmp_path: Path) -> None:
    log(tmp_path, range(1, 5))
    one = mirror(tmp_path)
    one.sync(running=True)
    server.away = True
    log(tmp_path, range(5, 9))
    for _ in range(2):
        with pytest.raises(UnreachableError, match="ConnectionError: refused"):
            one.sync(running=True)
    server.away = False
    assert one.sync(running=True) == 4
    assert server.held() == losses(range(1, 9))


def test_a_part_that_may_have_arrived_is_sent_again_as_it_was(server: Server, tmp_path: Path) -> None:
    """Else a line of a new attempt would give a step, whose first value is already there, a second one."""
    log(tmp_path, range(1, 3))
    mirror(tmp_path).sync(running=True)
    log(tmp_path, range(3, 5))
    server.loses_reply = True
    with pytest.raises(UnreachableError):
        mirror(tmp_path).sync(running=True)
    server.loses_reply = False
    log(tmp_path, range(3, 9), attempt=2, scale=2.0)
    mirror(tmp_path).sync(running=True)
    assert server.held() == losses(range(1, 5)) + losses(range(5, 9), 2.0)
    assert read_json(tmp_path / "mirror.json")["sending"] is None


def test_of_runs_made_twice_the_known_one_stays(server: Server, tmp_path: Path) -> None:
    log(tmp_path, range(1, 5))
    mirror(tmp_path).sync(running=True)
    server.create_run("x", 0, tags=server.runs["run0"].data.tags)  # asked for first, answered after we gave up
    mirror(tmp_path).sync(running=True)
    assert list(server.runs) == ["run0"]


def test_many_values_are_a_few_requests_and_none_is_lost(server: Server, tmp_path: Path) -> None:
    """More in one part of the file than MLflow takes at once."""
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for nimg in range(1, 1000):
        metrics.write(nimg, "train", loss=1 / nimg, **{f"value{k}": float(k) for k in range(3)})
    assert mirror(tmp_path).sync(running=True) == 4 * 999
    assert server.held() == losses(range(1, 1000))
    assert {len(points) for points in server.runs["run0"].data.metrics.values()} == {999}
    assert 4 <= server.batches < 10


def test_the_end_is_told_with_what_came_last(server: Server, tmp_path: Path) -> None:
    log(tmp_path, range(1, 5))
    write_json(tmp_path / "run.json", {"attempt": 1})
    write_json(tmp_path / "exit.json", {"code": 75, "reason": "SIGTERM", "nimg": 4, "attempt": 1})
    os.utime(tmp_path / "exit.json", (0, 1_700_000_000.5))
    follow._finish(mirror(tmp_path), 1, None)
    assert server.held() == losses(range(1, 5))
    assert server.runs["run0"].info.status == "KILLED"
    assert server.runs["run0"].info.end_time == 1_700_000_000_500  # MLflow counts milliseconds
    assert server.runs["run0"].data.tags["exit.reason"] == "SIGTERM"
