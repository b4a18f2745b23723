"""What several commands understand alike."""

from __future__ import annotations

import pytest

from launch import evaluate, sample, spectrum, trajectory
from launch.arguments import as_bnr
from tests.support.commands import call
from warm_dist.errors import ConfigError

COMMANDS = [(sample.main, "--weights", "w"), (evaluate.parse, "w"), (trajectory.main, "w"), (spectrum.main, "m")]


@pytest.mark.parametrize("text", ["nan", "inf", "1e200", "1e-320", "-1", "half"])
def test_a_ratio_that_no_config_takes_is_refused_by_every_command(text):
    """Fault: --bnr ends in an OverflowError, or a message about other options; or a command has a rule of its own."""
    for main, *words in COMMANDS:
        with pytest.raises(ConfigError, match=f"^--bnr {text}: needs 0 or a number from 1e-15 to 1e15$"):
            call(main, *words, "--bnr", text)


@pytest.mark.parametrize("text", [",", "", "1,,2", "1,"])
@pytest.mark.parametrize("flag", ["--bnr", "--nfe", "--method"])
def test_an_empty_entry_is_named(flag, text):
    """Fault: `--bnr=,` measures the default path without a word."""
    with pytest.raises(
        ConfigError, match=f"^{flag} '{text}': has an empty entry; write A,B or A B, or leave out {flag}$"
    ):
        call(evaluate.parse, "w", flag, text)


def test_zero_has_no_sign():
    """Fault: a note about BNR -0."""
    assert str(as_bnr("-0")) == "0.0"


def test_a_ratio_is_a_number():
    assert [as_bnr(text) for text in ("0", "0.5", "2e3")] == [0, 0.5, 2000]
