"""What fetch needs of S3, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warm_dist.errors import DataError


class MemoryStore:
    """Of S3, what `fetch` needs."""

    def __init__(self, objects: dict[str, bytes], refusal: Exception | None = None) -> None:
        self.objects, self.refusal, self.opened, self.downloads = objects, refusal, [], 0

    def open(self, url: str, endpoint_url: str | None = None) -> Any:
        self.opened.append(url)
        return self

    def download(self, path: str, local_file: Path) -> None:
        self.downloads += 1
        if path not in self.objects:
            raise DataError(f"s3://bucket/weights/{path}: does not exist")
        if self.refusal:
            raise self.refusal
        local_file.write_bytes(self.objects[path])

    def list(self, prefix: str = "") -> Mapping[str, Any]:
        return {path: len(data) for path, data in self.objects.items() if path.startswith(prefix)}
