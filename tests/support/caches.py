"""A folder's store that counts its GETs, and a cache in front of it."""

from __future__ import annotations

import random
from pathlib import Path

from warm_dist.store.cache import PAGE_BYTES, CachedStore
from warm_dist.store.folder import FolderStore

SIZE = 3 * PAGE_BYTES + PAGE_BYTES // 2


class Counting(FolderStore):
    """Remembers its GETs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gets: list[tuple[str, int, int]] = []

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.gets.append((path, start, length or 0))
        return super().read(path, start, length, etag)


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


def pages(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name.isdigit()]


def cached(base: FolderStore, limit_bytes: int = 1 << 30, folder: str = "cache") -> CachedStore:
    store = CachedStore(base, base.root.parent / folder, limit_bytes)
    store.list()
    return store
