"""A cache of objects' pages on a local disk, shared by all processes of a node: from the second epoch on it serves all.

Each page is a file, in one folder per version of an object. Readers take no lock: a page appears complete, by rename,
and never changes. Writers hold one lock, so the count of bytes is exact, and a partial file found under the lock
belongs to a killed writer. Source of the policy: derived, see `_make_room`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from warm_dist.errors import writing
from warm_dist.files import locked
from warm_dist.store.base import PARTIAL, Stat, Store

PAGE_BYTES = 256 << 10  # a request costs as much as 60 KiB of transfer: reading whole pages is cheap
_PAGES, _ACCOUNT = ".pages", "warm-dist.account"  # our names, in a folder that may hold anything else


class CachedStore(Store):
    """`base`, with ranged reads of known versions (etag given) cached below `folder`, up to `limit_bytes`.

    Cached pages are read without checking whether the object was replaced. Data sets in use at the same time need
    separate folders, or they drop each other's pages when it is full. Raises OutputError at once if the folder cannot
    be written; a disk that fails later only ends the caching, with one warning.
    """

    def __init__(self, base: Store, folder: Path, limit_bytes: int) -> None:
        self.base, self.url, self.folder, self.limit_bytes = base, base.url, folder, limit_bytes
        self._sizes: dict[tuple[str, str], int] = {}  # (path, etag) → bytes of the object
        self._keeping = True
        with writing(folder, "; set data.cache_dir to another folder, or to null"):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}{PARTIAL}"
            try:
                probe.write_bytes(bytes(min(PAGE_BYTES, limit_bytes)))
            finally:
                probe.unlink(missing_ok=True)

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if etag is None or not length:
            return self.base.read(path, start, length, etag)
        if (path, etag) not in self._sizes:
            self._know({path: self.base.stat(path)})
        size = self._sizes.get((path, etag), 0)
        if start + length > size:  # replaced or too short: the base raises the right error
            return self.base.read(path, start, length, etag)
        home, out = self._home(path, etag), io.BytesIO()
        first, end = start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)
        missing = first  # start of the run of missing pages, fetched with one GET
        for page in range(first, end + 1):
            data = self._load(home, page, size) if page < end else None
            if data is None and page < end:
                continue
            if missing < page:
                low, high = missing * PAGE_BYTES, min(page * PAGE_BYTES, size)
                fetched = memoryview(self.base.read(path, low, high - low, etag))
                self._keep(home, missing, fetched)
                out.write(fetched[max(start - low, 0) : start + length - low])
            if data is not None:
                low = page * PAGE_BYTES
                out.write(memoryview(data)[max(start - low, 0) : start + length - low])
            missing = page + 1
        return out.getvalue()

    def forget(self, path: str, start: int, length: int, etag: str) -> bool:
        home, found = self._home(path, etag), False
        for page in range(start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)):
            with suppress(OSError):
                (home / str(page)).unlink()
                found = True
        return self.base.forget(path, start, length, etag) or found

    def held_bytes(self, length: int) -> int:
        return self.base.held_bytes(length + 2 * PAGE_BYTES) + length * 9 // 8

    def list(self, prefix: str = "") -> dict[str, Stat]:
        return self._know(self.base.list(prefix))

    def stat(self, path: str) -> Stat:
        return self._know({path: self.base.stat(path)})[path]

    def write(self, path: str, data: bytes) -> None:
        self.base.write(path, data)

    def write_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        return self.base.write_if(path, data, etag)

    def upload(self, path: str, local_file: Path) -> None:
        self.base.upload(path, local_file)

    def delete(self, path: str) -> None:
        self.base.delete(path)

    def discard_partials(self, ours: re.Pattern[str]) -> None:
        self.base.discard_partials(ours)

    def _know(self, found: dict[str, Stat]) -> dict[str, Stat]:
        self._sizes.update({(path, stat.etag): stat.size for path, stat in found.items()})
        return found

    def _home(self, path: str, etag: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.url}\0{path}\0{etag}".encode()).hexdigest()[:32] + _PAGES)

    @staticmethod
    def _load(home: Path, page: int, size: int) -> bytes | None:
        """A page, if it exists and has its full length (a power cut can leave an empty file)."""
        try:
            data = (home / str(page)).read_bytes()
        except OSError:
            return None
        return data if len(data) == min(PAGE_BYTES, size - page * PAGE_BYTES) else None

    def _keep(self, home: Path, first: int, data: memoryview) -> None:
        """Cache consecutive pages from number `first` on, as far as the limit allows."""
        if not self._keeping:
            return
        partial = home / PARTIAL
        try:
            with locked(self.folder / _ACCOUNT, math.inf) as account:  # the number of cached bytes
                text = account.read().strip()
                used = int(text) if text.isdigit() else self._make_room(0)  # the file was lost or damaged
                for page, low in enumerate(range(0, len(data), PAGE_BYTES), first):
                    piece = data[low : low + PAGE_BYTES]
                    if _size(home / str(page)) == len(piece):  # another reader was faster
                        continue
                    if used + len(piece) > self.limit_bytes:
                        used = self._make_room(len(piece))
                        self._keeping = used + len(piece) <= self.limit_bytes
                        if not self._keeping:
                            return
                    used += len(piece)  # before the page exists: kill -9 in between makes the count too high, not low
                    account.seek(0)
                    account.write(f"{used:<20}")
                    account.flush()
                    home.mkdir(exist_ok=True)
                    partial.write_bytes(piece)
                    partial.replace(home / str(page))
        except OSError as error:
            self._keeping = False
            with suppress(OSError):
                partial.unlink()
            warnings.warn(f"{self.folder}: nothing more is cached ({error.strerror})", RuntimeWarning, stacklevel=2)

    def _make_room(self, needed: int) -> int:
        """Drop objects' versions that are not in this data set, oldest first; returns the bytes left.

        The data set's own pages stay unless the limit was lowered. Each is read once per epoch: a cache that holds a
        share f of the data and keeps it has hit rate f, while least-recently-used drops most pages just before they are
        read (hit rate f + (1 - f) ln(1 - f): 15 % at f = 1/2).
        """
        own = {self._home(*version) for version in self._sizes}
        sizes: dict[Path, int] = {}
        for home in self.folder.glob(f"*{_PAGES}"):
            (home / PARTIAL).unlink(missing_ok=True)
            sizes[home] = sum(entry.stat().st_size for entry in os.scandir(home))
        left = sum(sizes.values())
        for home in sorted(sizes, key=lambda home: (home in own, home.stat().st_mtime)):
            if left + (0 if home in own else needed) <= self.limit_bytes:
                break
            shutil.rmtree(home)
            left -= sizes[home]
        return left


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
