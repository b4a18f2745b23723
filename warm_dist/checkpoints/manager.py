"""A run's checkpoints: saved to its folder, uploaded to a store in the background, pruned, and restored.

Before the next step begins, every rank has written its file to the run's folder. If all ranks share that folder (tested
at the start), COMPLETE follows at once. With checkpoint.url the files are also uploaded, without a collective: rank 0
writes COMPLETE to the store when all of them are there.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
from warm_dist.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    MissingError,
    OutputError,
    UnreachableError,
    WarmDistError,
    writing,
)
from warm_dist.files import make_folder
from warm_dist.records import write_record
from warm_dist.runs.folder import METRICS, MIRROR
from warm_dist.runs.metrics import last_attempt, read_metrics
from warm_dist.store.base import Store
from warm_dist.store.open import open_store

GROUPS = re.compile(r"(checkpoints|snapshots)/\d{12}/.*")
PROBE = f"{CHECKPOINTS}/.probe"
_VISIBLE_S = 10.0  # how long a shared file system may take to show a new file


class CheckpointManager:
    """The checkpoints and snapshots of one run. All methods but `saved`, `ended`, `pending` and `close` are collectives.

    check: raises OutputError if the folder is no longer this run's; called before each save.
    Raises ConfigError if ranks do not share the run's folder and no checkpoint.url is set.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        config: CheckpointConfig,
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.world, self.config, self.say, self.check = run, world, config, say, check
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
                "checkpoint.url=s3://… or a shared output folder"
            )
        return not blind

    def _touch(self, name: str) -> str:
        with writing(self.run):
            (self.run / name).touch()
        return name

    def attempts(self) -> int:
        """The number of the last attempt in metrics.jsonl, 0 without one. A collective.

        The file is uploaded with every checkpoint, and fetched first if the store's is newer, so that the run's history
        and its mirror continue on another machine.
        """
        return int(on_main(self.world, self._attempts, METRICS))

    def _attempts(self) -> int:
        here = last_attempt(self.run / METRICS)
        if self.remote is None:
            return here
        there = self.run / f".{METRICS}.there"
        with suppress(MissingError):
            self.local.write(there.name, self.remote.read(METRICS))
            if (last := last_attempt(there)) > here:
                (self.run / MIRROR).unlink(missing_ok=True)  # its byte offset is in the other file
                there.replace(self.run / METRICS)
                here = last
        there.unlink(missing_ok=True)
        return here

    def _after_upload(self) -> None:
        """After an upload: send the log, prune old checkpoints. Failures are reported and do not undo the upload."""
        for what, action in (("metrics.jsonl not sent", self._send_log), ("old checkpoints kept", self._prune_remote)):
            try:
                action()
            except UnreachableError:
                raise  # retried
            except WarmDistError as error:
                self.say(f"{what}: {error}")

    def _send_log(self) -> None:
        assert self.remote is not None
        if (self.run / METRICS).exists():
            self.remote.write(METRICS, (self.run / METRICS).read_bytes())  # it may grow meanwhile

    def restore(self, check: Callable[[Saved], None], load: Callable[[Saved], None]) -> Saved | None:
        """Load the newest intact checkpoint; None if there has never been one. Damaged ones are reported and skipped.

        check: raises if a checkpoint is not this run's. load: raises CheckpointError for a damaged one.
        Raises CheckpointError if there are complete checkpoints and none is intact: never a silent fresh start.
        """
        candidates: list[tuple[bool, str]] = on_main(self.world, self._candidates, "list of checkpoints")
        problem = None
        for remote, name in candidates:
            store = self.remote if remote else self.local
            assert store is not None
            saved: Saved  # unless there is a problem
            saved, problem = self._agreed(partial(open_saved, store, name))
            if problem is None:
                check(saved)
                _, problem = self._agreed(partial(load, saved))
            if problem is None:
                on_main(self.world, partial(self._send_left_behind, saved), "leftovers")
                return saved
            self.say(f"damaged checkpoint skipped: {problem}")
        if candidates:
            raise CheckpointError(
                f"{self.run}: no intact checkpoint (the last: {problem}); set output to a new folder to start afresh"
            )
        return None

    def _agreed(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """(result of `action`, None), or (None, the first rank's CheckpointError). A collective."""
        result, mine = None, None
        try:
            result = action()
        except CheckpointError as error:
            mine = str(error)
        problems = [problem for problem in gather(self.world, mine, "checkpoint") if problem]
        return (None, problems[0]) if problems else (result, None)

    def _candidates(self) -> list[tuple[bool, str]]:
        """(is remote, name) of complete checkpoints, newest first, the local copy before the remote one."""
        if self.remote is not None:
            self.remote.write(PROBE, b"")  # a store that cannot be written should fail now, not after hours
            self.remote.delete(PROBE)
        found = [(False, name) for name in complete_names(self.local, CHECKPOINTS)] if self.shared else []
        found += [(True, name) for name in complete_names(self.remote, CHECKPOINTS)] if self.remote else []
        if not found and (last := self._last_saved()):
            where = " or ".join([str(self.run)] * self.shared + [self.config.url or ""] * bool(self.remote))
            raise CheckpointError(
                f"{self.run}: had a checkpoint at nimg {last}, and none is found in {where}; bring it back, or set output "
                "(and checkpoint.url) to a new place to start afresh"
            )
        return sorted(found, key=lambda one: (-nimg_of(one[1]), one[0]))

    def _last_saved(self) -> int:
        """The nimg of the last checkpoint that metrics.jsonl tells of where it should still be, 0 without one."""
        records = read_metrics(self.run / METRICS)
        saved = {r["nimg"] for r in records if r["kind"] == "upload" and r.get("failed") == 0}
        if self.shared and self.remote is None:
            saved |= {r["nimg"] for r in records if r["kind"] == "checkpoint"}
        return max(saved, default=0)

    def _send_left_behind(self, restored: Saved) -> None:
        """Upload what an earlier attempt could not, and discard its unfinished uploads."""
        if self.remote is None or self.uploads is None:
            return
        if discard := getattr(self.remote, "discard_partials", None):
            discard(GROUPS)
        if not self.shared:
            return
        there = {*complete_names(self.remote, SNAPSHOTS), *complete_names(self.remote, CHECKPOINTS)}
        here = complete_names(self.local, SNAPSHOTS) + ([restored.name] if restored.store is self.local else [])
        for name in [name for name in here if name not in there]:
            try:
                meta = open_saved(self.local, name).meta
            except CheckpointError as error:
                self.say(f"snapshot not sent: {error}")
                continue
            files = [self.run / name / line[key] for line in meta["files"] for key in ("file", "done")]
            self.uploads.add(Upload(name, files, meta, droppable=name == restored.name))

    def save(self, group: str, nimg: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> int:
        """Write this rank's tensors of a checkpoint or snapshot, then prune old checkpoints.

        Returns the bytes of all ranks' files. Raises OutputError on every rank, without writing COMPLETE, if any rank
        cannot write.
        """
        name = name_of(group, nimg)
        folder = self.run / name
        on_main(self.world, self.check, "claim")
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
            failure = error
        reports = gather(self.world, (line, failure), "checkpoint")
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error]
        if failures:
            kind = next(type(error) for _, error in reports if error)
            raise kind(f"{group[:-1]} at nimg {nimg} not saved; " + "; ".join(failures))
        tree = {"format": FORMAT, "nimg": nimg, **meta, "files": [line for line, _ in reports]}
        if self.shared:
            on_main(self.world, lambda: write_record(folder / COMPLETE, tree), "COMPLETE")
        if self.uploads:
            assert line is not None
            files = [folder / line["file"], folder / line["done"]]
            last = tree if self.world.is_main else None
            self.uploads.add(Upload(name, files, last, droppable=group == CHECKPOINTS))
        self._prune_local()
        return sum(line["bytes"] for line in tree["files"])

    def _make_room(self) -> None:
        """Keep at most two checkpoints in the upload queue, the oldest and the one to come. A collective.

        An upload that failed on one rank is cancelled on all.
        """
        if self.uploads is None:
            return
        states = gather(self.world, self.uploads.state(), "uploads")
        failed = {name for _, names in states for name in names}
        pending = sorted({name for names, _ in states for name in names} - failed)
        self.uploads.drop(failed | set(pending[1:]))

    def _make(self, folder: Path, needed: int, empty: bool = True) -> None:
        """Create a folder, and check that `needed` bytes are free. empty: remove what was there before."""
        try:
            if empty and os.path.lexists(folder):
                _remove(folder / COMPLETE)
                _remove(folder)
            make_folder(folder)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None
        if free < needed * 1.05:
            raise DiskFullError(
                f"{folder}: {needed:,} bytes to write, {free:,} free; make room, and the same command goes on from "
                "the last checkpoint"
            )

    def _kept(self, names: list[str]) -> set[str]:
        every = self.config.keep_every_nimg
        return set(names[-self.config.keep_last :]) | {name for name in names if every and not nimg_of(name) % every}

    def _prune_local(self) -> None:
        """Remove old checkpoints, COMPLETE first so that none is ever partial, and what a killed save left behind."""
        pending = self.uploads.pending() if self.uploads else set()
        if not self.shared:  # this rank's files are only needed until they are uploaded
            for path in self.run.glob(f"*/[0-9]*/rank_{self.world.rank}.*"):
                if path.parent.relative_to(self.run).as_posix() not in pending:
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # another rank's file is still there
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
        # on a new machine with nothing left to train, the last checkpoint is only in the store
        here = self.shared and name in complete_names(self.local, CHECKPOINTS)
        return open_saved(self.local if here or self.remote is None else self.remote, name)

    def ended(self) -> list[Upload]:
        """Uploads of this rank that ended since the last call."""
        out, self._ended = self._ended + (self.uploads.ended() if self.uploads else []), []
        return out

    def pending(self) -> list[str]:
        """Names of what is not in the store yet, in the order of nimg."""
        return sorted(self.uploads.pending()) if self.uploads else []

    def close(self, timeout_s: float) -> list[Upload]:
        """Wait for this rank's uploads, at most `timeout_s`; returns those that failed or have not finished."""
        if not self.uploads:
            return []
        late = self.uploads.close(timeout_s)
        for upload in late:
            upload.error = upload.error or f"not finished after {timeout_s:.0f} s; {upload.last_failure}"
        self._ended += self.uploads.ended()
        failed = [upload for upload in self._ended if upload.error and not upload.superseded]
        return [upload for upload in failed if upload not in late] + late


def _remove(path: Path) -> None:
    """Remove whatever is at a path: a file, a link, a folder with its content, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
