"""Where a run's checkpoints lie: in its folder, and in a store that gets them in the background; which are kept.

A save is a whole before the next step begins: every rank has written its file to the run's folder. If all ranks share
that folder (proven at the start), COMPLETE is written there at once. With checkpoint.url the files also go to that store,
without a collective: rank 0 writes COMPLETE there when it finds all of them.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from warm_dist.checkpoints.format import (
    CHECKPOINTS,
    COMPLETE,
    FORMAT,
    SNAPSHOTS,
    Saved,
    complete_names,
    name_of,
    nimg_of,
    open_saved,
    write_rank,
)
from warm_dist.checkpoints.uploads import Upload, Uploads
from warm_dist.config.run import CheckpointConfig
from warm_dist.distributed.collectives import gather, on_main
from warm_dist.distributed.world import World
from warm_dist.errors import CheckpointError, ConfigError, DataError, OutputError, UnreachableError, WarmDistError
from warm_dist.files import make_folder, write_json
from warm_dist.runs.folder import MIRROR
from warm_dist.runs.metrics import last_attempt
from warm_dist.store.base import Store
from warm_dist.store.open import open_store

GROUPS = re.compile(r"(checkpoints|snapshots)/\d{12}/.*")
PROBE = f"{CHECKPOINTS}/.probe"
METRICS = "metrics.jsonl"
_VISIBLE_S = 10.0  # how long a file system that is shared may take to show a new file


class CheckpointManager:
    """The checkpoints and snapshots of one run. All methods but `ended` and `close` are collectives.

    Raises ConfigError if ranks do not share the run's folder and no checkpoint.url is set.
    """

    def __init__(self, run: Path, world: World, config: CheckpointConfig, say: Callable[[str], None]) -> None:
        self.run, self.world, self.config, self.say = run, world, config, say
        make_folder(run)
        self.shared = self._prove_shared()
        self.local = open_store(str(run))
        self.remote: Store | None = open_store(config.url, config.endpoint_url) if config.url else None
        self.uploads = Uploads(self.remote, self._after_upload) if self.remote else None
        self._ended: list[Upload] = []

    def _prove_shared(self) -> bool:
        if self.world.size == 1:
            return True
        token = on_main(self.world, lambda: self._touch(f".shared-{secrets.token_hex(8)}"))
        deadline = time.monotonic() + _VISIBLE_S
        while not (seen := token in {path.name for path in self.run.glob(".shared-*")}) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [rank for rank, sees in enumerate(gather(self.world, seen)) if not sees]
        on_main(self.world, lambda: (self.run / token).unlink())
        if blind and not self.config.url:
            raise ConfigError(
                f"rank {blind[0]} does not see what rank 0 writes to output {self.run}: several machines need "
                "checkpoint.url=s3://… or an output folder that all of them share"
            )
        return not blind

    def _touch(self, name: str) -> str:
        try:
            (self.run / name).touch()
        except OSError as error:
            raise OutputError(f"{self.run}: cannot be written ({error.strerror})") from None
        return name

    # -- the run's history -------------------------------------------------------------------------------------------

    def attempts(self) -> int:
        """The highest attempt that metrics.jsonl tells of, 0 without one. A collective.

        It goes to the store with every checkpoint, and is fetched from there first where it is missing or an older one:
        so the run's history, and what mirrors it, go on on another machine, and back.
        """
        return int(on_main(self.world, self._attempts, "metrics.jsonl"))

    def _attempts(self) -> int:
        here = last_attempt(self.run / METRICS)
        if self.remote is None:
            return here
        there = self.run / f".{METRICS}.there"
        with suppress(DataError):  # there is none
            self.local.write(there.name, self.remote.read(METRICS))
            if (last := last_attempt(there)) > here:
                (self.run / MIRROR).unlink(missing_ok=True)  # it counts the bytes of the other file
                there.replace(self.run / METRICS)
                here = last
        there.unlink(missing_ok=True)
        return here

    def _after_upload(self) -> None:
        """What follows a checkpoint that has arrived: a store that refuses it is told of, and the checkpoint is there."""
        for what, action in (("metrics.jsonl not sent", self._send_log), ("old checkpoints stay", self._prune_remote)):
            try:
                action()
            except UnreachableError:
                raise  # it is tried again
            except WarmDistError as error:
                self.say(f"{what}: {error}")

    def _send_log(self) -> None:
        """The file grows while it is read: what stands there by now is sent."""
        assert self.remote is not None
        if (self.run / METRICS).exists():
            self.remote.write(METRICS, (self.run / METRICS).read_bytes())

    # -- resuming ---------------------------------------------------------------------------------------------------

    def restore(self, check: Callable[[Saved], None], load: Callable[[Saved], None]) -> Saved | None:
        """Load the newest intact checkpoint; None if there has never been one. Damaged ones are passed over with a warning.

        check: raises to refuse a checkpoint that is not this run's. load: raises CheckpointError for a damaged one.
        Raises CheckpointError if there are complete checkpoints and none is intact: never a silent fresh start.
        """
        candidates: list[tuple[bool, str]] = on_main(self.world, self._candidates, "list of checkpoints")
        problem = None
        for remote, name in candidates:
            store = self.remote if remote else self.local
            assert store is not None
            saved: Saved | None
            saved, problem = self._agreed(lambda store=store, name=name: open_saved(store, name))  # type: ignore[misc]
            if saved is not None:
                check(saved)
                _, problem = self._agreed(lambda saved=saved: load(saved))  # type: ignore[misc]
            if saved is not None and problem is None:
                on_main(self.world, lambda saved=saved: self._send_left_behind(saved), "leftovers")  # type: ignore[misc]
                return saved
            self.say(f"checkpoint passed over: {problem}")
        if candidates:
            raise CheckpointError(
                f"{self.run}: no intact checkpoint (the last fault: {problem}); set output to a new folder to start afresh"
            )
        return None

    def _agreed(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """Its result, or None with what was wrong with a checkpoint on the first rank that found fault with it."""
        result, mine = None, None
        try:
            result = action()
        except CheckpointError as error:
            mine = str(error)
        faults = [fault for fault in gather(self.world, mine, "checkpoint") if fault]
        return (None, faults[0]) if faults else (result, None)

    def _candidates(self) -> list[tuple[bool, str]]:
        """(is remote, name), the newest first, of two alike the local one."""
        if self.remote is not None:
            self.remote.write(PROBE, b"")  # better refused now than after hours
            self.remote.delete(PROBE)
        found = [(False, name) for name in complete_names(self.local, CHECKPOINTS)] if self.shared else []
        found += [(True, name) for name in complete_names(self.remote, CHECKPOINTS)] if self.remote else []
        return sorted(found, key=lambda one: (-nimg_of(one[1]), one[0]))

    def _send_left_behind(self, restored: Saved) -> None:
        """What an attempt before this one could not send any more; and nothing is left of uploads that broke off."""
        if self.remote is None or self.uploads is None:
            return
        if discard := getattr(self.remote, "discard_partials", None):
            discard(GROUPS)
        if not self.shared:
            return
        there = {*complete_names(self.remote, SNAPSHOTS), *complete_names(self.remote, CHECKPOINTS)}
        for name in (
            *complete_names(self.local, SNAPSHOTS),
            *([restored.name] if restored.store is self.local else ()),
        ):
            if name not in there:
                try:
                    meta = open_saved(self.local, name).meta
                except CheckpointError as error:
                    self.say(f"snapshot not sent: {error}")
                    continue
                files = [self.run / name / line[key] for line in meta["files"] for key in ("file", "done")]
                self.uploads.add(Upload(name, files, meta, droppable=name == restored.name))

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, group: str, nimg: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> int:
        """Write this rank's tensors of a checkpoint or snapshot, as a whole or not at all, and prune old checkpoints.

        Returns the bytes of all ranks' files. Raises OutputError on every rank if one of them cannot write; there is no COMPLETE then.
        """
        name = name_of(group, nimg)
        folder = self.run / name
        self._make_room()
        mine = sum(tensor.numel() * 4 for tensor in tensors.values())
        if self.shared:
            on_main(self.world, lambda: self._make(folder, mine * self.world.size), "folder of a checkpoint")
        line, failure = None, None
        try:
            if not self.shared:
                self._make(folder, mine, empty=False)
            line = write_rank(folder, self.world.rank, tensors)
        except OutputError as error:
            failure = str(error)
        reports = gather(self.world, (line, failure), "checkpoint")
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
        if failures:
            raise OutputError(f"{group[:-1]} at nimg {nimg} not saved; " + "; ".join(failures))
        tree = {"format": FORMAT, "nimg": nimg, **meta, "files": [line for line, _ in reports]}
        if self.shared:
            on_main(self.world, lambda: write_json(folder / COMPLETE, tree), "COMPLETE")
        if self.uploads:
            assert line is not None
            files = [folder / line["file"], folder / line["done"]]
            last = tree if self.world.is_main else None
            self.uploads.add(Upload(name, files, last, droppable=group == CHECKPOINTS))
        self._prune_local()
        return sum(line["bytes"] for line in tree["files"])

    def _make_room(self) -> None:
        """At most two checkpoints are on their way to the store, by all ranks' agreement: the oldest, and the one to come.

        One that has failed on a rank is given up by all.
        """
        if self.uploads is None:
            return
        states = gather(self.world, self.uploads.state(), "uploads")
        failed = {name for _, names in states for name in names}
        pending = sorted({name for names, _ in states for name in names} - failed)
        self.uploads.drop(failed | set(pending[1:]))

    def _make(self, folder: Path, needed: int, empty: bool = True) -> None:
        """The folder, if there is room for so many bytes in it; empty: of what was there before."""
        try:
            if empty and folder.exists():
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None
        if free < needed * 1.05:
            raise OutputError(
                f"{folder}: {needed:,} bytes to write, {free:,} free; make room, the same command goes on from the "
                "checkpoint before"
            )

    def _kept(self, names: list[str]) -> set[str]:
        every = self.config.keep_every_nimg
        return set(names[-self.config.keep_last :]) | {name for name in names if every and not nimg_of(name) % every}

    def _prune_local(self) -> None:
        """COMPLETE goes first, so that none is ever half a checkpoint; what a killed save left behind goes too."""
        pending = self.uploads.pending() if self.uploads else set()
        if not self.shared:  # the store has them: this rank's files go as soon as they are sent
            for path in self.run.glob(f"*/[0-9]*/rank_{self.world.rank}.*"):
                if path.parent.relative_to(self.run).as_posix() not in pending:
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # another rank's file is in it
                        path.parent.rmdir()
        elif self.world.is_main:
            names = complete_names(self.local, CHECKPOINTS)
            kept = self._kept(names) | pending
            for folder in (self.run / CHECKPOINTS).glob("[0-9]*"):
                name = f"{CHECKPOINTS}/{folder.name}"
                if name not in kept and name < names[-1]:
                    (folder / COMPLETE).unlink(missing_ok=True)
                    shutil.rmtree(folder, ignore_errors=True)

    def _prune_remote(self) -> None:
        assert self.remote is not None
        names = complete_names(self.remote, CHECKPOINTS)
        kept = self._kept(names)
        for path in sorted(self.remote.list(f"{CHECKPOINTS}/"), key=lambda path: not path.endswith(COMPLETE)):
            name = path.rpartition("/")[0]
            if name not in kept and names and name < names[-1]:
                self.remote.delete(path)

    def saved(self, nimg: int) -> Saved:
        """The complete checkpoint at nimg. Raises CheckpointError if there is none."""
        name = name_of(CHECKPOINTS, nimg)
        # a run that comes to a new machine with nothing left to train has its last checkpoint in the store alone
        here = self.remote is None or (self.shared and name in complete_names(self.local, CHECKPOINTS))
        return open_saved(self.local if here or self.remote is None else self.remote, name)

    # -- uploads ----------------------------------------------------------------------------------------------------

    def ended(self) -> list[Upload]:
        """Uploads of this rank that ended since the last call."""
        out, self._ended = self._ended + (self.uploads.ended() if self.uploads else []), []
        return out

    def close(self, timeout_s: float) -> list[Upload]:
        """Wait for this rank's uploads, at most so long; returns those that failed or are still under way."""
        if not self.uploads:
            return []
        late = self.uploads.close(timeout_s)
        for upload in late:
            upload.error = upload.error or f"not through after {timeout_s:.0f} s; {upload.last_failure}"
        self._ended += self.uploads.ended()
        return [
            upload for upload in self._ended if upload.error and not upload.superseded and upload not in late
        ] + late
