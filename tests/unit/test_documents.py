"""What the README and docstrings name is there."""

from __future__ import annotations

import re

from tests.support.paths import ROOT
from warm_dist import errors

README = (ROOT / "README.md").read_text()


def test_every_exit_code_is_in_the_readme():
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WarmDistError)
    ]
    assert told == {0} | {kind.exit_code for kind in kinds}


def test_files_named_in_the_readme_exist():
    named = re.findall(r"`((?:warm_dist|launch|data_pipelines|configs|docs)/[\w./]+)`", README)
    assert len(named) >= 7
    assert not [path for path in named if not (ROOT / path).exists()]


def test_sections_that_docstrings_cite_exist():
    sources = [path for folder in ("warm_dist", "launch", "data_pipelines") for path in (ROOT / folder).rglob("*.py")]
    cited = [
        found for path in sources for found in re.findall(r"(docs/[\w./-]+\.md)(?:, section (\d))?", path.read_text())
    ]
    assert len(cited) >= 7
    for name, section in cited:
        assert re.search(rf"^## {section}", (ROOT / name).read_text(), re.M), (name, section)
