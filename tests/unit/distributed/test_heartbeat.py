"""One rank's sign of life: its file, and the preemption file that it looks for."""

from __future__ import annotations

import base64
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from tests.support.lines import lines_run
from tests.support.patience import until
from warm_dist.distributed.heartbeat import Beat, Heartbeat, _is_local, _told
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World


def heartbeat(run: Path, preemption_file: Path | None = None) -> Heartbeat:
    """It beats every 0.2 s."""
    world = World(0, 1, torch.device("cpu"), None)
    return Heartbeat(world, run, 2.0, StopSignal(), preemption_file and str(preemption_file))


def told(run: Path) -> dict:
    path = run / "heartbeat" / "rank_0.json"
    return json.loads(path.read_text()) if path.exists() else {"place": None}


def test_a_file_tells_where_a_rank_is_and_that_it_ended(tmp_path):
    (tmp_path / "heartbeat").mkdir()
    for rank in (1, 7):  # of an attempt with more ranks
        (tmp_path / "heartbeat" / f"rank_{rank}.json").write_text("{}")
    began = time.time()
    with heartbeat(tmp_path) as beat:
        beat.facts["images_per_s"] = 12.5
        beat.at("backward", 4096)
        until(lambda: told(tmp_path)["place"] == "backward")
        line = told(tmp_path)
        assert (line["nimg"], line["rank"], line["pid"], line["facts"]) == (
            4096,
            0,
            os.getpid(),
            {"images_per_s": 12.5},
        )
        assert began - 0.01 <= line["time"] <= time.time() + 0.01
        assert line["since"] <= line["time"]
    assert told(tmp_path)["place"] == "ended"
    assert [path.name for path in (tmp_path / "heartbeat").iterdir()] == ["rank_0.json"]


def test_setting_the_phase_is_a_single_line(tmp_path):
    """Fault: a write, a lock or a message to other ranks in the inner loop."""
    assert lines_run(heartbeat(tmp_path).at, "forward", 8) == 1


def test_without_the_store_rank_0_is_not_waited_for_to_speak(tmp_path):
    """Fault: after rank 0's death its host's ranks leave it to rank 0 to say what happened, and nobody does."""
    beat = Heartbeat(World(1, 4, torch.device("cpu"), None), tmp_path, 2.0, StopSignal())
    beat.beats = [Beat(told={"host": beat.host}) for _ in range(3)] + [Beat(told={"host": "elsewhere"})]
    assert not beat.speaks(), "rank 0 does"
    beat._answered = -math.inf
    assert beat.speaks()
    beat.world = World(2, 4, torch.device("cpu"), None)
    assert not beat.speaks(), "rank 1 does"


def test_a_stop_does_not_wait_for_a_rank_that_hangs_or_has_no_batch(tmp_path):
    """Fault: the stop of one rank waits out the collective's timeout, since its peer is stopped or waits for a server."""
    beat = Heartbeat(World(1, 3, torch.device("cpu"), None), tmp_path, 60.0, StopSignal())
    now = time.monotonic()
    well = Beat(told={"host": "a", "place": "forward", "held_s": 90.0}, heard=now)
    beat.beats = [well, well, well]
    assert beat.hindrance() is None, "a long step is no hindrance"
    beat.beats[2] = Beat(told={"host": "b", "place": "forward"}, heard=now - 4.2)
    assert "waiting for rank 2 (host b), silent for 4 s" in str(beat.hindrance())
    beat.at("save", 8)
    assert beat.hindrance() is None, "whoever writes a checkpoint beats late"
    beat.beats[2] = Beat(told={"host": "b", "place": "data", "held_s": 3.5}, heard=now)
    assert "rank 2 (host b) waits for 4 s for its batch" in str(beat.hindrance())
    beat.beats[2] = Beat(told={"place": "data", "held_s": 3.5, "end": END}, heard=now)
    assert beat.hindrance() is None


def test_an_unwritable_folder_does_not_end_a_run(tmp_path):
    (tmp_path / "heartbeat").write_text("in the way")
    marker = tmp_path / "preempted"
    with heartbeat(tmp_path, marker) as beat:
        marker.touch()  # seen after at least one refused write
        until(lambda: beat.stop.name is not None)


def test_a_preemption_file_asks_to_stop_and_is_named(tmp_path):
    marker = tmp_path / "preempted"
    with heartbeat(tmp_path, marker) as beat:
        until(lambda: told(tmp_path)["place"] == "start")
        assert beat.stop.name is None
        marker.touch()
        until(lambda: beat.stop.name is not None)
    assert str(marker) in beat.stop.name


@pytest.mark.parametrize(
    "name", ["rank_0 (copy).json", "rank_.json", "rank_x.json", "rank_99999999999999999999.json", "rank_1"]
)
def test_odd_names_do_not_end_the_watch(tmp_path, name):
    """Fault: a copy of a heartbeat's file ends the watcher without a word, and the preemption file is then ignored."""
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / name).touch()
    stop_file = tmp_path / "stop"
    with heartbeat(tmp_path, stop_file) as beat:
        stop_file.touch()
        until(lambda: beat.stop.name is not None)
        assert "preemption_file" in beat.stop.name


def test_a_duty_that_ends_ends_the_run(tmp_path, monkeypatch):
    """Fault: a thread meets a surprise, dies, and takes its duty along."""
    monkeypatch.setattr(Heartbeat, "_write", lambda self, phase: 1 / 0)
    with heartbeat(tmp_path) as beat:
        until(lambda: beat.stop.name is not None)
        assert beat.stop.name == "the end of watch (ZeroDivisionError: division by zero)"


END = {"reason": "x", "code": 3, "resumable": False, "blames_a_peer": False}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", {}), (b"\xff\0", {}), (b"[1]", {}), (b"7", {}), (b"[" * 50_000, {}), (b'{"nimg": "8", "host": 7}', {}),
        (b'{"host": "a", "held_s": 1.5, "nimg": []}', {"host": "a", "held_s": 1.5}),
        (json.dumps({"end": {"code": 3}}).encode(), {}), (json.dumps({"end": END}).encode(), {"end": END}),
    ],
)  # fmt: skip
def test_garbage_in_the_store_says_nothing(raw, told):
    """Fault: garbage in the rendezvous store ends the talk between ranks."""
    assert _told(raw) == told
    beat = Beat(raw, 0.0, _told(raw))
    assert beat.progress[0] == 0
    assert isinstance(beat.where + beat.host, str)


@pytest.mark.parametrize(
    ("hosts", "local"), [(["localhost"], True), (["node1"], False), (["localhost", "node1"], False)]
)
def test_a_launcher_of_this_machine_alone_is_known(hosts, local):
    """Fault: the deepspeed command was killed before its ranks began, and they train to the end without it."""
    world = base64.urlsafe_b64encode(json.dumps({host: [0] for host in hosts}).encode()).decode()
    assert _is_local(["python", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "x.py"]) is local
    assert _is_local(["python", "--world_info=%%"]) is _is_local([]) is False
