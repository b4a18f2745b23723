"""A run's checkpoints with a state of one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_run import ALONE
from warm_dist.checkpoints.format import CHECKPOINTS, Saved, _pieces, complete_names, nimg_of
from warm_dist.checkpoints.manager import CheckpointManager
from warm_dist.config.run import CheckpointConfig

META = {"num_steps": 1, "config": {}, "data": {}, "fingerprint": "x"}


class Fixture:
    """A run's storage in a folder, with a store beside it if `url` is given, and a state of one number."""

    def __init__(self, run: Path, said: list[str], **settings: Any) -> None:
        self.said = said
        self.storage = CheckpointManager(run, ALONE, CheckpointConfig(**settings), said.append)
        self.loaded: list[int] = []

    def save(self, nimg: int, group: str = CHECKPOINTS) -> None:
        self.storage.save(group, nimg, {"master/w@0": torch.tensor([float(nimg)])}, META)

    def restore(self) -> int | None:
        """The nimg of what was restored, read as `Trainer` would."""

        def load(saved: Saved) -> None:
            for file in saved.meta["files"]:
                for tensor, values in _pieces(saved, [file], lambda *_: True):
                    assert (tensor.kind, values.item()) == ("master", saved.meta["nimg"])

        saved = self.storage.restore(lambda saved: None, load)
        return None if saved is None else saved.meta["nimg"]

    def names(self, group: str = CHECKPOINTS) -> list[int]:
        return [nimg_of(name) for name in complete_names(self.storage.local, group)]
