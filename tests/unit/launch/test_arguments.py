"""What several commands understand alike."""

from __future__ import annotations

import pytest

from launch import evaluate, sample, spectrum, trajectory
from launch.arguments import as_bnr, check_label, check_memory
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


@pytest.mark.parametrize(
    ("label", "classes", "told"),
    [
        (10, 10, "--label 10: needs a class of this network, from 0 to 9"),
        (-1, 10, "--label -1: needs a class of this network, from 0 to 9"),
        (0, 0, "--label 0: this network has no classes; leave it out"),
    ],
)
def test_a_label_is_one_of_the_network_s(label, classes, told):
    for fine in (0, 9, None):
        check_label(fine, 10)
    check_label(None, 0)
    with pytest.raises(ConfigError) as caught:
        check_label(label, classes)
    assert str(caught.value) == told


def test_more_images_than_the_memory_holds_are_refused():
    """Fault: `sample.py --n 2147483647` is silent until it is killed for its memory."""
    check_memory("--n", 64, 3 * 64 * 64)
    with pytest.raises(ConfigError, match=r"^--n 2147483647: needs 26,388 GB of memory, this machine has \d+$"):
        check_memory("--n", 2**31 - 1, 3 * 64 * 64)
