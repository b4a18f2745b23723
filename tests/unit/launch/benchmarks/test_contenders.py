"""Rounds of everybody in turn: what a budget leaves out, what a failure does, and the contenders' configs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launch.benchmarks.contenders import OutOfTime, Rounds, changed, engine_keys, parts_of, unlogged, within
from tests.support.paths import ROOT


class Clock:
    """A time that passes only by `spend`, and ends there at a limit."""

    def __init__(self) -> None:
        self.now, self.end = 0.0, float("inf")

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        late = self.now + seconds > self.end
        self.now = min(self.now + seconds, self.end)
        if late:
            raise OutOfTime

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        self.end = self.now + seconds
        try:
            yield
        finally:
            self.end = float("inf")


class Made:
    """A contender that takes `seconds` a round, and does `also` in it."""

    def __init__(self, clock: Clock, start_s: float, seconds: float, also: Callable[[], None] = lambda: None) -> None:
        clock.spend(start_s)
        self.clock, self.seconds, self.also = clock, seconds, also
        self.closed_at: float | None = None
        self.facts = {"seconds": seconds}

    def round(self) -> dict[str, Any]:
        self.also()
        self.clock.spend(self.seconds)
        return {"seconds": self.seconds, "at": self.clock.now}

    def close(self) -> None:
        self.closed_at = self.clock.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def measured(
    clock: Clock, number: int, budget_s: float, **starts: Callable[[], Made]
) -> tuple[Rounds, dict[str, Made]]:
    made: dict[str, Made] = {}
    rounds = Rounds(
        lambda name: made.setdefault(name, starts[name]()), number, budget_s + 3, clock, clock.limit, slack_s=3
    )
    for _ in rounds.measure(list(starts)):
        pass
    return rounds, made


def test_everybody_has_a_turn_a_round(clock: Clock) -> None:
    """Fault: a contender measures all its rounds before the next one starts."""
    rounds, made = measured(clock, 3, 100, a=lambda: Made(clock, 5, 1), b=lambda: Made(clock, 0, 2))
    assert [found["at"] for found in rounds.rounds["a"]] == [6, 9, 12]
    assert [found["at"] for found in rounds.rounds["b"]] == [8, 11, 14]
    assert rounds.facts == {"a": {"seconds": 1}, "b": {"seconds": 2}}
    assert (rounds.failed, rounds.unreached) == ({}, [])
    assert [one.closed_at for one in made.values()] == [14, 14]


def test_a_long_start_cannot_take_the_rounds_of_those_before_it(clock: Clock) -> None:
    """Fault: a compilation eats the budget, and nobody has more than one round; or it runs beyond the budget."""
    starts = {"a": lambda: Made(clock, 5, 1), "b": lambda: Made(clock, 60, 1), "c": lambda: Made(clock, 0, 1)}
    rounds, _ = measured(clock, 5, 20, **starts)
    assert [found["at"] for found in rounds.rounds["a"]] == [6, 17, 18, 19, 20]
    assert (rounds.cut_off, rounds.unreached) == (["b"], ["c"])
    assert [rounds.outcome(name) for name in "abc"] == ["measured", "cut off", "not reached"]


def test_a_round_that_the_budget_cuts_off_does_not_count(clock: Clock) -> None:
    """Fault: half a round is a figure, or a contender with whole rounds is said to be unreached."""
    rounds, made = measured(clock, 3, 7.5, a=lambda: Made(clock, 0, 1), b=lambda: Made(clock, 0, 4))
    assert (len(rounds.rounds["a"]), len(rounds.rounds["b"])) == (2, 2)
    assert (rounds.unreached, clock.now) == ([], 10.5)  # with the slack
    rounds, made = measured(clock, 1, 3, b=lambda: Made(clock, 0, 4))
    assert (rounds.rounds, rounds.cut_off, rounds.unreached) == ({}, ["b"], [])
    assert made["b"].closed_at is not None


def test_a_failure_is_told_and_the_others_go_on(clock: Clock) -> None:
    """Fault: one contender's failure, early or late, ends everything; or what failed stays in memory and in the table."""

    class OutOfMemoryError(RuntimeError):
        pass

    def fail() -> None:
        if clock.now > 4:
            raise OutOfMemoryError("no 7 GiB\nand more")

    def refuse() -> Made:
        raise ValueError

    rounds, made = measured(clock, 4, 99, a=lambda: Made(clock, 0, 1), b=lambda: Made(clock, 0, 1, fail), c=refuse)
    assert rounds.failed == {"b": "no 7 GiB (beside 1 other contenders)", "c": "ValueError"}
    assert (len(rounds.rounds["a"]), rounds.rounds.keys(), rounds.facts.keys()) == (4, {"a"}, {"a"})
    assert (made["b"].closed_at, made["a"].closed_at) == (5, 6)


def test_an_interrupt_keeps_what_was_measured(clock: Clock) -> None:
    """Fault: Ctrl-C loses the rows so far, leaves a contender open, or is taken for a contender's failure."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    made = {"a": Made(clock, 0, 1), "b": Made(clock, 0, 1, interrupt), "c": Made(clock, 0, 1)}
    rounds = Rounds(made.__getitem__, 2, 99, clock, clock.limit)
    with pytest.raises(KeyboardInterrupt):
        list(rounds.measure([*made]))
    assert (rounds.rounds.keys(), rounds.failed, rounds.cut_off, rounds.unreached) == ({"a"}, {}, ["b"], ["c"])
    assert [one.closed_at for one in made.values()] == [1, 1, None]


def test_a_limit_ends_what_runs_and_leaves_the_timer_of_others() -> None:
    """Fault: the time is looked at only between contenders; or the outer limit is gone after an inner one."""

    def nested() -> None:
        with within(10):
            pass
        time.sleep(5)

    with pytest.raises(OutOfTime), within(0.1):
        nested()
    with within(0.01):
        pass
    time.sleep(0.02)  # over, and nothing comes


def test_a_contender_is_a_config_of_its_own() -> None:
    """Fault: batches that no save or log divides, a micro-batch of the file's, or the file's own engine."""
    path = ROOT / "configs" / "imagenet64.json"
    mine = unlogged(48) | {"output": "here"}
    local = changed(path, mine | engine_keys("local", "fp32"), [])
    sharded = changed(path, mine | engine_keys("zero3", "bf16"), ["train.micro_batch_size=8"])
    assert (local.engine, local.parallel.precision, local.train.micro_batch_size) == ("local", "fp32", None)
    assert (sharded.engine, sharded.parallel.zero_stage, sharded.parallel.precision) == ("deepspeed", 3, "bf16")
    assert sharded.train.micro_batch_size == 8
    assert local.train.batch_size == 48
    assert parts_of("zero3-bf16-compiled") == ("zero3", "bf16", True)
    assert parts_of("sampling-fp32") == ("sampling", "fp32", False)
