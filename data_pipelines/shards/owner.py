"""Who packs into a folder: the parts of one packing together, two packings never."""

from __future__ import annotations

import math
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from warm_dist.errors import OutputError, printable, writing
from warm_dist.files import locked
from warm_dist.store.base import Store
from warm_dist.store.folder import FolderStore
from warm_dist.store.lease import Lease

_GATE = ".packing.lock"  # held while the others are looked at
_MEMBER = ".packing.{recipe}.{kind}.{id}"  # a file for each process that packs, locked until it ends
_POLL_S = 0.2


@contextmanager
def owned(store: Store, recipe: str, alone: bool = False) -> Iterator[None]:
    """Hold a folder or prefix for one recipe; other processes of the same recipe may join.

    alone: in a folder, wait until no other process holds it. Raises OutputError if another recipe holds it, or if it cannot be written.
    """
    with ExitStack() as stack:
        if isinstance(store, FolderStore):
            with writing(store.root, "; choose another folder"):
                store.root.mkdir(parents=True, exist_ok=True)
                while not _join(stack, store.root, recipe, alone):
                    time.sleep(_POLL_S)
        else:
            stack.enter_context(Lease(store, ".packing.json", "packing", group=recipe))
        yield


def _join(stack: ExitStack, root: Path, recipe: str, alone: bool) -> bool:
    """Become a holder of the folder until the stack ends; False if that has to wait for others of the same recipe."""
    with locked(root / _GATE, wait_s=math.inf):
        for member in root.glob(_MEMBER.format(recipe="*", kind="*", id="*")):
            try:
                locked(member).close()
                member.unlink(missing_ok=True)  # it was killed
            except BlockingIOError:
                owner, kind = member.name.split(".")[2:4]
                if owner != recipe:
                    what = f"another packing (recipe {owner}, {printable(member.read_text())}) is writing here"
                    raise OutputError(
                        f"{printable(str(root))}: {what}; stop it first, or choose another folder"
                    ) from None
                if alone or kind == "finish":
                    return False
        kind = "finish" if alone else "part"
        path = root / _MEMBER.format(recipe=recipe, kind=kind, id=uuid.uuid4().hex[:8])
        file = stack.enter_context(locked(path))
        stack.callback(path.unlink, missing_ok=True)  # before the file is closed
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        return True
