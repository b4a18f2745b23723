"""One owner at a time: who comes second is refused while the first is alive, and takes over when it is gone."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import until
from warm_dist.errors import OutputError, UnreachableError
from warm_dist.records import seal
from warm_dist.store import lease as module
from warm_dist.store.folder import FolderStore
from warm_dist.store.lease import Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.05)
    monkeypatch.setattr(module, "LEASE_S", 0.4)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next lease one of another machine."""
    numbers = itertools.count()
    return lambda: monkeypatch.setattr(module, "_machine", lambda: f"machine {next(numbers)}")


def test_a_second_owner_is_refused_while_the_first_is_alive(tmp_path: Path, elsewhere: Any) -> None:
    """Fault: two runs on one checkpoint.url replace each other's checkpoints, and both end well."""
    store = FolderStore(tmp_path)
    elsewhere()
    with Lease(store, "owner.json", "run a") as first:
        with (
            pytest.raises(OutputError, match=r"in use by run a \(process \d+ on .*\); stop that first"),
            Lease(store, "owner.json", "run b"),
        ):
            pass
        first.check()
    with Lease(store, "owner.json", "run b") as second:  # at once: the first gave it back
        second.check()


def test_one_that_is_gone_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str], elsewhere: Any) -> None:
    store = FolderStore(tmp_path)
    elsewhere()
    gone = Lease(store, "owner.json", "run a")
    assert gone._write(None)  # and never refreshed, as after kill -9 on another machine
    with Lease(store, "owner.json", "run b") as second:
        second.check()
        gone._refresh()
        with pytest.raises(OutputError, match="was taken over by run b"):
            gone.check()
        second._refresh()
        second.check()
    assert capsys.readouterr().err.count("belongs to run a (process") == 1


def test_one_that_died_on_this_machine_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", 3600.0)
    store = FolderStore(tmp_path)
    dead = Lease(store, "owner.json", "run a")
    monkeypatch.setattr(module.supervisor, "identity", lambda pid: "4194399:1")
    assert dead._write(None)
    monkeypatch.undo()
    with Lease(store, "owner.json", "run b") as second:
        second.check()


def test_a_group_shares_and_another_group_does_not(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with Lease(store, "o", "packing", group="one") as a, Lease(store, "o", "packing", group="one") as b:
        for _ in range(4):
            a._refresh()
            b._refresh()
        a.check()
        b.check()
        with pytest.raises(OutputError, match="in use by packing"), Lease(store, "o", "packing", group="two"):
            pass


@pytest.mark.parametrize(("group", "owners"), [("one", 8), ("", 1)])
def test_who_comes_at_once(tmp_path: Path, elsewhere: Any, group: str, owners: int) -> None:
    """Fault: two parts of one packing begin together, and the one that is a moment later ends with a traceback."""
    elsewhere()
    start, ended, ends = threading.Barrier(8), threading.Barrier(8), list[str]()

    def enter(number: int) -> None:
        start.wait()
        try:
            with Lease(FolderStore(tmp_path), "o", f"packing {number}", group=group) as lease:
                lease.check()
                ends.append("entered")
                ended.wait(10)
        except OutputError as error:
            ends.append(str(error))
            ended.wait(10)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 8
    assert ends.count("entered") == owners
    assert all("in use by packing" in end for end in ends if end != "entered")


def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    """Fault: the record is looked at and then written, and whoever comes in between is not seen."""
    stores = [FolderStore(tmp_path) for _ in range(8)]
    start, won = threading.Barrier(len(stores)), list[str]()

    def take(number: int) -> None:
        start.wait()
        if stores[number].write_if("o", b"%d" % number, None):
            won.append(str(number))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stores[0].read("o").decode()] == won
    etag = stores[0].stat("o").etag
    assert stores[0].write_if("o", b"x", "another") is None
    assert stores[0].write_if("o", b"x", etag) == stores[0].stat("o").etag


def test_an_outage_and_an_answer_that_was_lost_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    real, down = store.write_if, threading.Event()

    def write_if(path: str, data: bytes, etag: str | None) -> str | None:
        written = real(path, data, etag)
        if down.is_set():
            raise UnreachableError("the answer is lost")
        return written

    with Lease(store, "o", "run a") as mine:
        monkeypatch.setattr(store, "write_if", write_if)
        down.set()
        beat = mine._beat
        until(lambda: mine._beat > beat + 2)
        down.clear()
        beat = mine._beat
        until(lambda: mine._beat > beat + 2)
        mine.check()


@pytest.mark.parametrize("data", [b"", b"garbage", b"{}", seal({"id": "x"})])
def test_a_damaged_record_is_of_an_unknown_owner(tmp_path: Path, data: bytes) -> None:
    FolderStore(tmp_path).write("o", data)
    with Lease(FolderStore(tmp_path), "o", "run a") as mine:
        mine.check()
