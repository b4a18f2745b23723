"""Exclusive use of a place in a store: a record there names the owner, who refreshes it while alive.

Each change is conditional on the version that was seen (S3's If-None-Match and If-Match), so of two who come at once one
wins. Clocks are never compared: who finds another's record watches whether it changes.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from warm_dist import supervisor
from warm_dist.errors import DataError, OutputError, UnreachableError, WarmDistError, print_line
from warm_dist.records import DamagedError, Record, seal, unseal
from warm_dist.store.base import Store

REFRESH_S = 5.0
RELEASE_S = 2.0  # for a server that hangs when the place is given back; without it, others wait LEASE_S
LEASE_S = 20.0  # without a refresh for so long, the owner counts as gone


class Owner(Record):
    """The record. group: what several owners have in common who may share the place; empty: none may.

    machine, process: of the owner, if alone. beat: counts refreshes.
    """

    id: str
    group: str
    who: str
    machine: str
    process: str
    beat: int
    released: bool


class _Found(NamedTuple):
    owner: Owner | None  # None: not readable
    etag: str


class Lease:
    """`with Lease(store, "owner.json", "run runs/a") as lease:`, and `lease.check()` before what only an owner may do.

    who: for messages to others. group: owners of the same group share the place. Entering raises OutputError if another
    owner is alive, waiting up to LEASE_S to find out, and what the store raises.
    """

    def __init__(self, store: Store, path: str, who: str, group: str = "") -> None:
        self.store, self.path, self.group = store, path, group
        self.who = f"{who} (process {os.getpid()} on {socket.gethostname()})"
        self.id = group or secrets.token_hex(8)
        self._beat, self._etag = 0, ""
        self._lost: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._refresh_always, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        watched, since = "", 0.0
        while True:
            found = self._find()
            free = found is None or self._is_free(found.owner)
            silent = found is not None and found.etag == watched and time.monotonic() - since > LEASE_S
            if (free or silent) and self._write(found.etag if found else None):
                break
            if found is not None and not free:
                if not watched:
                    watched, since = found.etag, time.monotonic()
                    text = f"{self._name}: belongs to {self._describe(found)}"
                    print_line(f"{text}; waiting {LEASE_S:.0f} s whether that is alive")
                elif found.etag != watched:
                    text = f"{self._name}: in use by {self._describe(found)}"
                    raise OutputError(f"{text}; stop that first, or choose another place")
            time.sleep(random.uniform(0, REFRESH_S / 5))  # several may try at once
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the place back; owners of a group only stop refreshing, since others may be left."""
        self._ending.set()
        self._thread.join(RELEASE_S)

    def check(self) -> None:
        """Raise OutputError if another owner has taken the place meanwhile."""
        if self._lost is not None:
            raise OutputError(f"{self._name}: was taken over by {self._lost}; this process writes nothing more there")

    @property
    def _name(self) -> str:
        return self.store.url

    def _is_free(self, owner: Owner | None) -> bool:
        return owner is not None and (owner.released or owner.id == self.id or _is_dead(owner))

    def _find(self) -> _Found | None:
        try:
            etag = self.store.stat(self.path).etag
            return _Found(unseal(self.store.read(self.path, etag=etag), Owner), etag)
        except DamagedError:
            return _Found(None, etag)
        except DataError:  # none, or replaced since
            return None

    def _write(self, etag: str | None, released: bool = False) -> bool:
        self._beat += 1
        alone = not self.group
        owner = Owner(
            id=self.id,
            group=self.group,
            who=self.who,
            machine=_machine() if alone else "",
            process=supervisor.identity(os.getpid()) if alone else "",
            beat=self._beat,
            released=released,
        )
        written = self.store.write_if(self.path, seal(owner.model_dump()), etag)
        self._etag = written or self._etag
        return written is not None

    def _refresh_always(self) -> None:
        while not self._ending.wait(REFRESH_S):
            try:
                self._refresh()
            except UnreachableError:
                pass  # nobody else can take it either
            except Exception as error:  # the place may be lost, which the next refresh finds out
                print_line(f"{self._name}: the lease is not refreshed ({error})")
            if self._lost is not None:
                return
        if not self.group:
            with suppress(WarmDistError):
                self._write(self._etag, released=True)

    def _refresh(self) -> None:
        if self._write(self._etag):
            return
        found = self._find()  # our own write may have arrived although its answer did not
        if found is not None and found.owner is not None and found.owner.id == self.id:
            self._etag = found.etag
        elif found is None:
            self._write(None)
        else:
            self._lost = self._describe(found)

    @staticmethod
    def _describe(found: _Found) -> str:
        return found.owner.who if found.owner else "an unknown owner"


def _machine() -> str:
    """Names the kernel and the set of processes that `supervisor.identity` tells apart."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def _is_dead(owner: Owner) -> bool:
    return bool(owner.process) and owner.machine == _machine() and not supervisor.alive(owner.process)
