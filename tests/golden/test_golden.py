"""The comparison finds what differs; in the soak, the product still gives its golden values."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.golden import __main__ as golden
from tests.golden.compare import compare, dump, flatten
from tests.golden.workshop import CommandError
from tests.support.processes import ROOT


@pytest.fixture
def kept():
    return json.loads(golden.VALUES.read_text())


def changed(tree, path, value):
    """A copy with the value at a path changed."""
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


LOSS = ("train", "local-fp32-1", "loss", 19)
PLANTED = {
    "the last bits of a loss": (LOSS, 1e-15, True, 1),
    "the same on another machine": (LOSS, 1e-15, False, 0),
    "a wrong loss on another machine": (LOSS, 1e-3, False, 1),
    "a wrong bf16 loss on another machine": (("train", "zero3-bf16-2", "loss", 19), 0.1, False, 1),
    "an image": (("samples", "long", "heun", "images"), "0", True, 1),
    "an image on another machine": (("samples", "long", "heun", "images"), "0", False, 0),
    "a data set on another machine": (("data", "digits8", "facts"), "0", False, 1),
    "a trial's name on another machine": (("sweeps", "sweep_smoke.json", 0), "bnr=0", False, 1),
    "a flag on another machine": (("help", "launch/train.py", "flags"), "--config", False, 1),
}
"""Where; the new value, or the relative change of a number; whether the machine is the same; how many differences are found."""


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_difference_is_found_where_it_can_be(kept, case):
    path, value, same_machine, expected = PLANTED[case]
    flat = "/".join(map(str, path))
    old = flatten(kept["values"])[flat]
    value = old * (1 + value) if isinstance(value, float) else value
    result = compare(kept["values"], changed(kept["values"], path, value), same_machine)
    assert [difference.key for difference in result.different] == [flat] * expected
    if expected:
        assert (result.different[0].old, result.different[0].new) == (old, value)
    assert len(result.same) + len(result.different) + len(result.skipped) == len(flatten(kept["values"]))
    assert bool(result.skipped) != same_machine


def test_a_value_that_is_gone_or_new_is_found(kept):
    less = json.loads(json.dumps(kept["values"]))
    del less["samples"]["long"]["heun"]
    for same_machine in (True, False):
        for old, new in ((kept["values"], less), (less, kept["values"])):
            found = [difference.key for difference in compare(old, new, same_machine).different]
            assert found == ["samples/long/heun/images", "samples/long/heun/says/0"]


def test_the_values_are_kept_as_they_are_written(kept):
    """Fault: a values.json edited by hand, or a `dump` that would rewrite lines whose values are equal."""
    assert dump(kept) == golden.VALUES.read_text()


def test_check_tells_of_a_difference_and_of_another_machine(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden, "make", lambda parts: ({part: kept["values"][part] for part in parts}, []))
    monkeypatch.setattr(golden, "fingerprint", lambda: kept["machine"])
    assert golden.main(["check"]) == 0
    assert capsys.readouterr().out.strip().endswith(f"{len(flatten(kept['values'])):,} values equal")

    other = tmp_path / "values.json"
    other.write_text(dump(kept | {"values": changed(kept["values"], ("plans", "cifar10.json"), "another")}))
    assert golden.main(["check", "--values", str(other), "--only", "plans"]) == 1
    out = capsys.readouterr().out
    assert "plans/cifar10.json" in out
    assert "was 'another'" in out
    assert "1 values differ" in out

    monkeypatch.setattr(golden, "fingerprint", lambda: kept["machine"] | {"cpu": "another"})
    assert golden.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "NOT COMPARED BIT BY BIT" in out
    assert "cpu is another, was " in out
    assert "git worktree add" in out


def test_a_part_that_fails_is_told_beside_the_others(kept, tmp_path, monkeypatch, capsys):
    def fails(shop):
        raise CommandError("launch/sweep.py: exit code 1")

    monkeypatch.setattr(golden, "PARTS", {"plans": lambda shop: kept["values"]["plans"], "sweeps": fails})
    monkeypatch.setattr(golden, "fingerprint", lambda: kept["machine"])
    assert golden.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "sweeps: FAILED, CommandError: launch/sweep.py: exit code 1" in out
    assert f"{len(kept['values']['plans'])} values equal" in out
    assert golden.main(["write", "--out", str(tmp_path / "values.json")]) == 1
    assert not (tmp_path / "values.json").exists()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_product_gives_its_golden_values():
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
