"""What a launcher sets: read in one way, and what is no number is named."""

from __future__ import annotations

import sys

import pytest

from warm_dist import errors
from warm_dist.distributed.environment import from_environment
from warm_dist.distributed.world import master_address, prepare_host
from warm_dist.errors import ConfigError


@pytest.mark.parametrize(("text", "number"), [(None, 3), ("", 3), (" ", 3), ("0", 0), (" 12\n", 12)])
def test_a_number_or_the_default(text, number, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if text is not None:
        monkeypatch.setenv("RANK", text)
    assert from_environment("RANK", 3) == number


@pytest.mark.parametrize("text", ["-1", "1.0", "1_0", "two", "$N"])
@pytest.mark.parametrize("name", ["MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_what_is_no_number_is_named(name, text, monkeypatch):
    """Fault: `invalid literal for int() with base 10` and a traceback."""
    for other in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"{name}=.*: needs a number; the launcher sets it"):
        master_address() if name == "MASTER_PORT" else prepare_host()


@pytest.mark.parametrize(("text", "heard"), [("", True), ("0", True), ("x", True), ("1", False)])
def test_an_error_is_heard_from_a_machine_s_first_rank(text, heard, monkeypatch, capsys):
    """Fault: with LOCAL_RANK empty or no number a command ends without a word."""

    def main():
        raise ConfigError("why")

    monkeypatch.setattr(errors, "_mute", False)
    monkeypatch.setattr(errors, "adapt", lambda: None)
    monkeypatch.setattr(errors.os, "_exit", sys.exit)
    monkeypatch.setenv("LOCAL_RANK", text)
    with pytest.raises(SystemExit):
        errors.run(main)
    assert (capsys.readouterr().err == "ConfigError: why\n") == heard
