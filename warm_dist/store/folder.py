"""A local or mounted folder as a store."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from warm_dist.errors import AccessError, DataError, MissingError, writing
from warm_dist.files import locked, make_durably, open_regular, sync
from warm_dist.store.base import PARTIAL, Stat, Store, too_short

_CHANGE_S = 10.0  # longest wait for another process that changes the same object
_OWN_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")


class FolderStore(Store):
    """Objects are files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(self.root)

    def read(self, path: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        target = self.root / path
        with self._input(target), open(open_regular(target), "rb") as file:
            if etag is not None and self._tag(os.fstat(file.fileno())) != etag:
                raise DataError(f"{target}: was replaced since it was first read")
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) < length:
            raise too_short(str(target), start, length, start + len(data))
        return data

    def write(self, path: str, data: bytes) -> None:
        with self._replacing(path) as partial:
            partial.write_bytes(data)

    def write_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        target = self.root / path
        with writing(target):
            make_durably(target.parent)
            with locked(target.with_name(f".{target.name}.lock{PARTIAL}"), _CHANGE_S):
                found = self._tag(target.stat()) if target.exists() else None
                if found != etag:
                    return None
                self.write(path, data)
                return self._tag(target.stat())

    def upload(self, path: str, local_file: Path) -> None:
        with self._replacing(path) as partial:
            shutil.copyfile(local_file, partial)

    def stat(self, path: str) -> Stat:
        with self._input(self.root / path):
            stat = (self.root / path).stat()
            return Stat(stat.st_size, self._tag(stat))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        out = {}
        for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
            for name in names:
                path = (Path(folder) / name).relative_to(self.root).as_posix()
                if path.startswith(prefix) and not name.endswith(PARTIAL):
                    with suppress(DataError):  # deleted meanwhile
                        out[path] = self.stat(path)
        return dict(sorted(out.items()))

    def delete(self, path: str) -> None:
        target = self.root / path
        with writing(target):
            target.unlink(missing_ok=True)
        for folder in target.parents:  # like S3, leave no empty folders
            if folder == self.root or self.root not in folder.parents:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def discard_partials(self, ours: re.Pattern[str]) -> None:
        for folder, _, names in os.walk(self.root):
            for partial in filter(None, map(_OWN_PARTIAL.fullmatch, names)):
                target = Path(folder) / partial[1]
                if ours.fullmatch(target.relative_to(self.root).as_posix()):
                    with writing(target):
                        target.with_name(partial[0]).unlink(missing_ok=True)

    @staticmethod
    def _tag(stat: os.stat_result) -> str:
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"

    @contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        target = self.root / path
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
        with writing(target):
            make_durably(target.parent)
            try:
                yield partial
                sync(partial)  # or a power cut could leave an empty file
                partial.replace(target)
                sync(target.parent)
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def _input(target: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise MissingError(f"{target}: does not exist") from None
        except PermissionError:
            raise AccessError(f"{target}: this user may not read it") from None
        except OSError as error:
            raise DataError(f"{target}: cannot be read ({error.strerror})") from None
