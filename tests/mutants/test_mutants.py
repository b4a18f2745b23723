"""The list of faults fits the code, and the run tells a caught fault from one that survives and from a wrong entry."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter

from tests.mutants.run import LIST, ROOT, main, mutated, read

AREAS = ("process", "heads", "samplers", "network", "engine", "ema", "checkpoint", "lanes", "loader", "evaluation", "mirror",
         "sweep", "manifests", "packing", "record", "durable", "store", "environment", "others")  # fmt: skip


def test_every_fault_can_be_put_in_and_its_tests_exist():
    for mutant in read(ROOT):
        assert mutated(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
        assert mutant.why
        assert mutant.tests
        for test in mutant.tests:
            path, _, name = test.partition("::")
            text = (ROOT / path).read_text(encoding="utf-8")
            top = re.escape(name.partition("::")[0].partition("[")[0])  # a class may have inherited its tests
            assert not name or re.search(rf"^(def|class) {top}\(", text, re.M), test


def test_there_are_faults_of_every_area():
    names = [mutant.id for mutant in read(ROOT)]
    assert len(set(names)) == len(names) >= 60
    counts = Counter(name.partition("-")[0] for name in names)
    assert set(counts) == set(AREAS)
    assert min(counts.values()) >= 5


def test_a_run_tells_what_became_of_each_fault(tmp_path, capsys):
    entry = {"file": "toy/__init__.py", "old": "1 + 1", "why": "x", "tests": ["test_toy.py::test_two"]}
    entries = [
        {**entry, "id": "caught", "new": "1 + 2"},
        {**entry, "id": "survived", "new": "2"},
        {**entry, "id": "nowhere", "old": "3", "new": "4"},
        {**entry, "id": "twice", "old": "1", "new": "4"},
        {**entry, "id": "no-python", "new": "1 +"},
        {**entry, "id": "not-collected", "new": "1 / 0"},
    ]
    files = {
        LIST: json.dumps(entries),
        "toy/__init__.py": "TWO = 1 + 1\n",
        "test_toy.py": "from toy import TWO\n\n\ndef test_two():\n    assert TWO == 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert main(["--jobs", "2", "--out", str(tmp_path / "table")], tmp_path) == 1
    lines = (tmp_path / "table").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    states = [line.split()[0] for line in lines]
    assert states == ["caught", "survived", "error", "error", "error", "error", "1"]
    assert lines[0].endswith("toy/__init__.py: test_toy.py::test_two")
    for line, words in zip(lines[2:], ["occurs 0 times", "occurs 2 times", "no Python", "ended with"], strict=False):
        assert words in line
    assert lines[-1] == "1 of 6 caught"
    (tmp_path / "toy" / "__init__.py").write_text("TWO = 1 + 1 + 0.5\n")
    assert main(["--only", "caught"], tmp_path) == 2, "a test that fails without a fault proves nothing"
