"""Where a packed data set lies."""

from __future__ import annotations

from typing import NamedTuple

from data_pipelines.shards.manifest import NAME, Manifest


class Packed(NamedTuple):
    """A packed data set."""

    url: str
    endpoint_url: str | None
    manifest: Manifest

    @property
    def manifest_url(self) -> str:
        return f"{self.url}/{NAME}"
