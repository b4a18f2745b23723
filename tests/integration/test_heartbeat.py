"""What ranks' heartbeats tell of one another: three of them around one real store, in one process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.support.patience import until
from tests.support.processes import ROOT, free_port
from warm_dist import supervisor
from warm_dist.distributed.heartbeat import Beat, Heartbeat, deepspeed_runner
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import World, _store, _who_stayed_away, beat_key, interface_to
from warm_dist.errors import DataError, Stopped, UnreachableError

TIMEOUT_S = 2.0  # beats every 0.2 s, silent after 0.6 s
ERROR = RuntimeError("[gloo] Timed out waiting 2000ms")


def heartbeat(rank: int, run: Path, size: int = 3, preemption_file: str | None = None) -> Heartbeat:
    world = World(rank, size, torch.device("cpu"), None)
    return Heartbeat(world, run, TIMEOUT_S, StopSignal(), preemption_file)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The store as rank 0 of three opens it, after all three have come; emptied, it is closed."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    held = [_store(0, 3, timedelta(seconds=5))]
    for rank in range(3):
        held[0].set(beat_key(rank), json.dumps({"host": f"node{rank}"}))
    yield held
    held.clear()


def heard(listener: Heartbeat, rank: int, place: str) -> Callable[[], bool]:
    return lambda: listener.beats[rank].told.get("place") == place


def test_a_rank_that_says_nothing_is_named_with_its_host_and_place(store, tmp_path):
    word = {"host": "node2", "place": "backward", "nimg": 4096, "held_s": 0.1, "end": None}
    with heartbeat(0, tmp_path) as first, heartbeat(1, tmp_path) as second:
        store[0].set(beat_key(2), json.dumps(word))  # its last
        for beat in (first, second):
            beat.at("flags", 4112)
        until(heard(first, 2, "backward"))
        began = time.monotonic()
        message = first.diagnose(ERROR)
        assert time.monotonic() - began < 2 * first.silent_s
        assert message.startswith(
            "rank 2 (host node2) has been silent for 1 s, last at 'backward' of nimg 4096; rank 0 (host "
        )
        assert "waited at 'flags' of nimg 4112 for" in message
        assert first.peers_end() is None
        assert [first.speaks(), second.speaks()] == [True, False]


def test_the_longest_silence_grows_and_is_not_that_of_a_rank_that_ended(store, tmp_path):
    word = {"host": "node2", "place": "backward", "nimg": 4096, "held_s": 0.1, "end": None}
    with heartbeat(0, tmp_path) as first, heartbeat(1, tmp_path):
        store[0].set(beat_key(2), json.dumps(word))  # its last
        until(heard(first, 2, "backward"))
        early = first.silence_s()
        until(lambda: first.silence_s() > early + 2 * first.silent_s)
        store[0].set(beat_key(2), json.dumps({**word, "end": {"code": 3}}))
        until(lambda: first.silence_s() < first.silent_s)
    assert heartbeat(0, tmp_path, 1).silence_s() == 0.0


def test_a_rank_that_beats_elsewhere_is_named_and_not_called_silent(store, tmp_path):
    with heartbeat(0, tmp_path) as first, heartbeat(1, tmp_path) as late, heartbeat(2, tmp_path) as waiting:
        first.at("update", 4112)
        late.at("data", 4112)
        waiting.at("backward", 4112)  # for rank 1, as does rank 0
        until(lambda: first.beats[1].held_s > first.silent_s and heard(first, 2, "backward")())
        message = first.diagnose(ERROR)
        assert message.startswith(f"rank 1 (host {first.host}) is at 'data' of nimg 4112 for 1 s, and alive; rank 0")


def test_nobody_is_blamed_when_all_wait_at_one_place(store, tmp_path):
    with heartbeat(0, tmp_path) as first, heartbeat(1, tmp_path) as second, heartbeat(2, tmp_path) as third:
        for beat in (first, second, third):
            beat.at("flags", 8)
        until(lambda: heard(first, 1, "flags")() and heard(first, 2, "flags")())
        assert first.diagnose(ERROR).startswith("every rank answers ([gloo] Timed out waiting 2000ms); rank 0")


def test_ranks_that_have_long_waited_where_this_one_waits_are_not_behind(tmp_path):
    """They wait for the same rank, or for nobody: only those at an earlier place are to blame."""
    mine = heartbeat(0, tmp_path)
    mine.at("flags", 8)
    there = {"host": "node", "nimg": 8, "held_s": 60.0}
    mine.beats[1:] = [Beat(told={**there, "place": "flags"})] * 2
    assert mine._behind() == ""
    mine.beats[2] = Beat(told={**there, "place": "ema"})
    assert mine._behind().startswith("rank 2 (host node) is at 'ema' of nimg 8 for 60 s")


def test_a_rank_that_blames_another_is_not_blamed(store, tmp_path):
    with heartbeat(0, tmp_path) as first:
        with pytest.raises(UnreachableError), heartbeat(1, tmp_path) as second:
            raise UnreachableError(second.diagnose(ERROR))
        message = first.diagnose(ERROR)
        assert first.peers_end() is None
        assert message.startswith("rank 2 (host node2) has been silent for")


def test_a_join_that_lacks_a_rank_names_it(store):
    message = _who_stayed_away(store[0], 5)
    assert message == "ranks 3, 4 did not come, only 0 (host node0), 1 (host node1), 2 (host node2)"


def test_the_interface_is_found_by_the_route():
    assert interface_to("localhost") == "lo"
    assert interface_to("127.0.0.5") == "lo"
    assert interface_to("no.such.host.invalid") is None


def test_the_deepspeed_command_is_watched_and_nothing_else(tmp_path):
    """Three generations with the command lines of deepspeed, its launch.py and a rank."""
    assert deepspeed_runner() == ""
    rank = "from warm_dist.distributed.heartbeat import deepspeed_runner as r; print(r(), flush=True); input()"
    parent = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[3:]])"
    launch = tmp_path / "launch.py"
    launch.write_text(parent)
    here, there = (
        "--world_info=" + base64.urlsafe_b64encode(json.dumps({host: [0]}).encode()).decode()
        for host in ("localhost", "n")
    )
    for runner, world, watched in (("deepspeed", here, True), ("bash.py", there, False), ("bash.py", here, None)):
        path = tmp_path / runner
        path.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
        command = [sys.executable, str(path), str(launch), "deepspeed.launcher.launch", world, "-c", rank]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = process.stdout.readline().strip()
        gone = "" if watched is False else f"{process.pid}:gone"  # a parent that is not the runner of a local launch
        assert said == (supervisor.identity(process.pid) if watched else gone)
        assert supervisor.alive(said) is (watched is True)
        process.communicate("\n", timeout=20)


def test_a_lost_store_is_rank_0s_machine_and_another_rank_speaks(store, tmp_path):
    with heartbeat(1, tmp_path) as second, heartbeat(2, tmp_path) as third:
        store[0].set(beat_key(0), json.dumps({"host": "node0", "place": "data", "nimg": 64, "held_s": 0.0}))
        until(lambda: heard(second, 0, "data")() and heard(second, 2, "start")() and heard(third, 1, "start")())
        store.clear()
        message = second.diagnose(ERROR)
        assert message.startswith("rank 0 (host node0) or the link to it is gone: 127.0.0.1:")
        assert "rank 0 was last at 'data' of nimg 64; rank 1" in message
        until(third._store_is_lost)
        assert [second.speaks(), third.speaks()] == [True, False]


@pytest.mark.parametrize("error", [DataError("image 17 is damaged"), Stopped("SIGTERM")])
def test_a_rank_that_ends_says_why_at_once(store, tmp_path, error):
    with heartbeat(0, tmp_path) as first, heartbeat(2, tmp_path):
        with pytest.raises(type(error)), heartbeat(1, tmp_path):
            raise error
        began = time.monotonic()
        first.diagnose(ERROR, lambda: first.peers_end() is not None)
        assert time.monotonic() - began < first.silent_s
        end = first.peers_end()
        assert (str(end), end.exit_code, end.resumable) == (
            f"{type(error).__name__}: {error}",
            error.exit_code,
            error.resumable,
        )
