"""Uploads of saved checkpoints: one thread sends them in order, beside the training, retrying through outages."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from warm_dist.errors import DataError, UnreachableError, WarmDistError
from warm_dist.records import seal
from warm_dist.store.base import Store

MAX_PAUSE_S = 10.0  # longest pause between two attempts; each is drawn uniformly up to a doubling limit
_POLL_S = 0.2  # how often rank 0 looks for the other ranks' files


class Upload:
    """One rank's files of one checkpoint; rank 0 also writes COMPLETE when all ranks' files are in the store.

    files: sent in this order, to `name/FILE`. complete: content of COMPLETE, None on other ranks. droppable: a newer
    checkpoint may replace it.
    """

    def __init__(self, name: str, files: list[Path], complete: dict[str, Any] | None, droppable: bool) -> None:
        self.name, self.files, self.complete, self.droppable = name, files, complete, droppable
        self.begun = time.monotonic()
        self.dropped = threading.Event()
        self.superseded = False
        self.seconds = 0.0
        self.error: str | None = None
        self.last_failure = ""


class Uploads:
    """A queue of uploads and its thread. after: called when a COMPLETE has been written, to prune the store."""

    def __init__(self, store: Store, after: Callable[[], None]) -> None:
        self.store, self.after = store, after
        self._queue: deque[Upload] = deque()  # the first one is being sent
        self._ended: list[Upload] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def add(self, upload: Upload) -> None:
        """Append an upload to the queue."""
        with self._changed:
            self._queue.append(upload)
            self._changed.notify_all()

    def state(self) -> tuple[list[str], list[str]]:
        """Names of droppable uploads in the queue, oldest first, and names of failed ones."""
        with self._changed:
            return [u.name for u in self._queue if u.droppable], [u.name for u in self._ended if u.error]

    def drop(self, names: set[str]) -> None:
        """Cancel these uploads; the one being sent stops as soon as it can, the others end at once."""
        with self._changed:
            for upload in [upload for upload in self._queue if upload.name in names]:
                upload.superseded = True
                upload.dropped.set()
                if upload is not self._queue[0]:  # its files are no longer needed, however long the first one takes
                    upload.error = self._given_up(upload)
                    self._queue.remove(upload)
                    self._ended.append(upload)

    def pending(self) -> set[str]:
        """Names in the queue, whose local files are still needed."""
        with self._changed:
            return {upload.name for upload in self._queue}

    def ended(self) -> list[Upload]:
        """Uploads that ended since the last call; `error` says why one failed."""
        with self._changed:
            out, self._ended = self._ended, []
        return out

    def close(self, timeout_s: float) -> list[Upload]:
        """Wait up to `timeout_s` for the queue to empty; cancels and returns what is left. The thread then ends."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._queue and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            left_over = list(self._queue)
            for upload in left_over:
                upload.dropped.set()
        return left_over

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closing:
                        return
                    self._changed.wait()
                upload = self._queue[0]
            try:
                self._send(upload)
            except WarmDistError as error:
                upload.error = str(error)
            except Exception as error:  # a bug must be reported and must not end the thread
                upload.error = f"{type(error).__name__}: {error}"
            upload.seconds = time.monotonic() - upload.begun
            with self._changed:
                self._queue.popleft()
                self._ended.append(upload)
                self._changed.notify_all()

    def _send(self, upload: Upload) -> None:
        for path in upload.files:
            self._retry(upload, partial(self.store.upload, f"{upload.name}/{path.name}", path))
        if upload.complete is None:
            return
        absent = list(upload.complete["files"])
        while absent := self._retry(upload, lambda: [f for f in absent if not self._arrived(upload.name, f)]):
            if upload.dropped.wait(_POLL_S):
                upload.last_failure = f"{', '.join(file['file'] for file in absent[:4])} did not come"
                break
        text = seal(upload.complete)
        self._retry(upload, lambda: self.store.write(f"{upload.name}/COMPLETE", text))
        with suppress(UnreachableError):  # the checkpoint is complete all the same; the next upload prunes too
            self._retry(upload, self.after)

    def _arrived(self, name: str, file: dict[str, Any]) -> bool:
        """Whether this rank's file is in the store, and not one of an earlier attempt at the same nimg."""
        with suppress(DataError):
            return bool(hashlib.sha256(self.store.read(f"{name}/{file['done']}")).hexdigest() == file["sha256"])
        return False

    @staticmethod
    def _retry(upload: Upload, action: Callable[[], Any]) -> Any:
        """Call `action`, retrying until the store answers or the upload is cancelled. Raises UnreachableError."""
        failures = 0
        while not upload.dropped.is_set():
            try:
                return action()
            except UnreachableError as error:
                failures, upload.last_failure = failures + 1, str(error)
            upload.dropped.wait(random.uniform(0, min(MAX_PAUSE_S, 0.5 * 2**failures)))
        raise UnreachableError(Uploads._given_up(upload))

    @staticmethod
    def _given_up(upload: Upload) -> str:
        why = "a newer one takes its place" if upload.superseded else "the run ends"
        return f"given up, {why}{f'; {upload.last_failure}' if upload.last_failure else ''}"
