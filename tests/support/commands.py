"""A command called in this process, as its user would call it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


def call(main: Callable[[], int], *words: object) -> int:
    """What `main` returns with these words behind the command's name; what it raises is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        return main()
