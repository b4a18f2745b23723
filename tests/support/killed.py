"""Run by test_kills.py: kill -9 at every phase of a save, then resume; the outcome of each phase as JSON.

Every attempt is two real processes, forked here from one that has imported all. The first attempt dies at its second
save, at the phase's place: the rank that comes there kills itself, its peer is killed when that is seen, as when their
machine loses power. The second attempt is the same, without a killer, and runs to the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_run import BATCH, batches, config, info, state_digest
from warm_dist.checkpoints import format, manager
from warm_dist.checkpoints.format import CHECKPOINTS, complete_names
from warm_dist.distributed.stop import StopSignal
from warm_dist.distributed.world import join
from warm_dist.runs.metrics import MetricsLog, read_metrics
from warm_dist.store.open import open_store
from warm_dist.store.s3 import S3Store
from warm_dist.supervisor import free_port
from warm_dist.training import step_metrics
from warm_dist.training.trainer import Trainer

SIZE, STEPS, SAVE_STEPS = 2, 6, 2
URL = "s3://warm-dist/kills"
LARGE = "during upload"


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """`arm(owner, name, when)`: from the second save on, die before (or after) owner.name is called with such arguments."""

    def __init__(self) -> None:
        self.saves = 0

    def arm(self, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True, after: bool = False) -> None:
        original = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            armed = self.saves >= 2 and when(*args)
            if armed and not after:
                die()
            result = original(*args, **kwargs)
            if armed:
                die()
            return result

        setattr(owner, name, deadly)


def breaks_off(killer: Killer) -> None:
    """Die when some bytes of a file, not the first, have been sent."""
    upload_fileobj: list[Any] = []

    def upload(self: S3Store, path: str, local_file: Path) -> None:
        if not upload_fileobj:
            upload_fileobj.append(self.client.upload_fileobj)
        callback = die if killer.saves >= 2 and path.endswith(".safetensors") else None
        sent = 0

        def count(num_bytes: int) -> None:
            nonlocal sent
            sent += num_bytes
            if callback and sent > local_file.stat().st_size // 2:
                callback()

        with local_file.open("rb") as file:
            upload_fileobj[0](file, self.bucket, self.prefix + path, Callback=count)

    S3Store.upload = upload  # type: ignore[method-assign]


def is_file(kind: str) -> Callable[..., bool]:
    return lambda store, path, *_: "checkpoints/" in path and path.endswith(kind)


# phase → (the rank that dies, how it is brought about)
PHASES: dict[str, tuple[int, Callable[[Killer], None]]] = {
    "before": (1, lambda k: k.arm(manager.CheckpointManager, "save", lambda self, group, *_: group == "checkpoints")),
    "folder made": (1, lambda k: k.arm(manager, "write_rank")),
    "in a rank's file": (0, lambda k: k.arm(format, "_digest", lambda data: len(data) > 4096)),
    "before .done": (1, lambda k: k.arm(format, "write_json")),
    "before COMPLETE": (0, lambda k: k.arm(manager, "write_record")),
    "after COMPLETE": (0, lambda k: k.arm(manager, "write_record", after=True)),
    LARGE: (1, breaks_off),
    "upload without .done": (0, lambda k: k.arm(S3Store, "upload", is_file(".done"))),
    "before COMPLETE in the store": (0, lambda k: k.arm(S3Store, "write", is_file("COMPLETE"))),
    "after COMPLETE in the store": (0, lambda k: k.arm(S3Store, "write", is_file("COMPLETE"), after=True)),
    "while pruning": (0, lambda k: k.arm(S3Store, "delete", after=True)),
}


def attempt(phase: str, folder: Path, number: int, rank: int, port: int, killer_of: bool) -> None:
    """One rank of one attempt."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join(30)
    changes: dict[str, Any] = {
        "engine": "local",
        "train__total_nimg": BATCH * STEPS,
        "train__save_nimg": BATCH * SAVE_STEPS,
        "network__channels": 40 if phase.endswith(LARGE) else 8,  # a large file's upload is one of several parts
        "network__dropout": 0.1,
        "checkpoint__keep_last": 1,
    }
    if not phase.startswith("unbroken"):
        changes |= {
            "checkpoint__url": f"{URL}/{folder.name}",
            "checkpoint__endpoint_url": os.environ["S3_ENDPOINT_URL"],
        }
    settings = config(folder, **changes)
    killer = Killer()
    if killer_of:
        PHASES[phase][1](killer)
    place = manager.CheckpointManager(folder, world, settings.checkpoint, lambda text: None)
    trainer = Trainer(settings, world, info(), lambda text: None, place)
    trainer.restore()
    (folder / f"from-{number}").write_text(str(trainer.nimg))
    save, step = trainer.save, trainer.step

    def counted_save() -> None:
        deadline = time.monotonic() + 30
        while place.uploads and place.uploads.pending() and time.monotonic() < deadline:
            time.sleep(0.01)  # the one before is to be in the store, whatever becomes of this one
        killer.saves += 1
        save()
        if killer_of and killer.saves == 2:  # the end comes from the thread that uploads
            time.sleep(60)

    def noted(data: Any) -> Any:
        with (folder / f"seen-{number}-{rank}").open("a") as file:
            file.writelines(f"{position}\n" for position in data.batch.positions)
        return step(data)

    trainer.save, trainer.step = counted_save, noted  # type: ignore[method-assign]
    log = MetricsLog(folder / "metrics.jsonl", number) if world.is_main else None
    trainer.fit(batches(world, trainer.nimg), log, StopSignal(), None, set())
    late = place.close(20)
    assert not late, late[0].error
    digest = state_digest(world, trainer)
    if world.is_main:
        (folder / "digest").write_text(json.dumps(digest))


def run(phase: str, folder: Path, number: int, killer_rank: int | None) -> list[int]:
    """Both ranks of an attempt; their exit statuses, negative for a signal."""
    port = free_port()
    children = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            try:
                attempt(phase, folder, number, rank, port, rank == killer_rank)
                os._exit(0)
            except BaseException:
                if killer_rank is None:
                    traceback.print_exc()
                os._exit(1)
        children.append(pid)
    if killer_rank is not None:  # its peer can go no further than the next step
        status = os.waitstatus_to_exitcode(os.waitpid(children[killer_rank], 0)[1])
        other = children[1 - killer_rank]
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        return [status]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def outcome(folder: Path) -> dict[str, Any]:
    """Losses of all steps, digest of the state, and how often each image was trained on by what the run is made of."""
    begins = [int((folder / f"from-{n}").read_text()) for n in (1, 2) if (folder / f"from-{n}").exists()]
    ends = [*begins[1:], BATCH * STEPS]
    seen: list[int] = []
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True), 1):
        for rank in range(SIZE):
            positions = [int(line) for line in (folder / f"seen-{number}-{rank}").read_text().split()]
            seen += [position for position in positions if begin <= position < end]
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "losses": [r["loss"] for r in records],
        "digest": json.loads((folder / "digest").read_text()),
        "each image once": sorted(seen) == list(range(BATCH * STEPS)),
        "resumed at": begins[-1],
    }


def left_in_store(folder: Path) -> list[str]:
    store = open_store(f"{URL}/{folder.name}", os.environ["S3_ENDPOINT_URL"])
    return complete_names(store, CHECKPOINTS)


def main() -> None:
    root = Path(sys.argv[1])
    step_metrics.flops_per_image = lambda *_: 1.0  # counting them takes as long as the steps do
    results: dict[str, Any] = {}
    for name in ("unbroken", f"unbroken, {LARGE}"):
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        results[name] = {"statuses": run(name, folder, 1, None)} | outcome(folder)
    for phase, (rank, _) in PHASES.items():
        for local in (True, False) if "store" in phase or "upload" in phase else (True,):
            name = phase if local else f"{phase}, on a fresh machine"
            folder = root / name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            killed = run(phase, folder, 1, rank)
            if not local:  # the folder is lost, but for what the test notes
                shutil.rmtree(folder / "checkpoints")
            statuses = run(phase, folder, 2, None)
            results[name] = outcome(folder) | {"killed": killed, "statuses": statuses, "store": left_in_store(folder)}
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
