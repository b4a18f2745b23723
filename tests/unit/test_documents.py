"""What the documents and docstrings name is there: files, modules, targets of make, exit codes, sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.unit.test_architecture import ROWS
from warm_dist import errors

README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "k8s" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = r"\.ci|warm_dist|data_pipelines|launch|tests|configs|docs|k8s|base|overlays|components|image"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def missing(page: Path) -> list[str]:
    """What the page names and the repository lacks. Paths count from the root or from the page's folder; `*` matches anything."""
    text = page.read_text()
    paths = set(re.findall(rf"(?<![\w./:-])((?:{FOLDERS})/[\w./*-]*\w)", text))
    paths |= set(re.findall(r"`(\w+\.(?:py|md|j2|toml|lock))`", text))
    paths |= {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    absent = [path for path in paths if not any(any(home.glob(path)) for home in (ROOT, page.parent))]
    modules = set(re.findall(r"-m ((?:warm_dist|data_pipelines|launch|tests)[\w.]*)", text))
    absent += [name for name in modules if not is_command(ROOT / name.replace(".", "/"))]
    targets = set(re.findall(r"(?:`|^ *)make ([a-z]+)", text, re.M))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    return absent + [f"make {name}" for name in targets - known]


def is_command(module: Path) -> bool:
    """Whether `python -m` runs it: a file with a main, or a package with __main__.py."""
    file = module.with_suffix(".py")
    return (module / "__main__.py").exists() or (file.exists() and '__name__ == "__main__"' in file.read_text())


@each_page
def test_what_a_document_names_exists(page):
    assert missing(page) == []


def test_a_name_that_is_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`warm_dist/lost.py`, `lost.py`, [lost](lost.md), `python -m warm_dist.lost`, `make lost`; `warm_dist/rng.py`, `make test`"
    )
    assert sorted(missing(page)) == ["lost.md", "lost.py", "make lost", "warm_dist.lost", "warm_dist/lost.py"]


def test_the_architecture_lists_every_file_with_its_size():
    rows = re.findall(
        r"^\| `((?:warm_dist|data_pipelines|launch)[\w/]*)/` \| (.*?) \| ([\d,]+) \|$", ARCHITECTURE.read_text(), re.M
    )
    told = {
        f"{home}/{name}.py": int(size) for home, files, _ in rows for name, size in re.findall(r"`(\w+)` (\d+)", files)
    }
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for package in ("warm_dist", "data_pipelines", "launch")
        for path in (ROOT / package).rglob("*.py")
        if path.stem != "__init__"
    }
    assert told.keys() == sizes.keys()
    # a size helps to choose what to read: small changes of a file need no change of the page
    assert {name: size for name, size in sizes.items() if abs(size - told[name]) > max(20, size // 5)} == {}
    assert sum(int(total.replace(",", "")) for *_, total in rows) == sum(told.values())


def test_the_rows_of_the_architecture_are_those_that_are_checked():
    told = re.findall(r"^\| \d \| (.*?) \|", ARCHITECTURE.read_text(), re.M)
    assert [row.replace("`", "") for row in told] == list(ROWS)


def test_every_exit_code_is_in_the_readme():
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README.read_text(), re.M)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WarmDistError)
    ]
    assert told == {0} | {kind.exit_code for kind in kinds}


def test_sections_that_docstrings_cite_exist():
    sources = [path for folder in ("warm_dist", "launch", "data_pipelines") for path in (ROOT / folder).rglob("*.py")]
    cited = [
        found for path in sources for found in re.findall(r"(docs/[\w./-]+\.md)(?:, section (\d))?", path.read_text())
    ]
    assert len(cited) >= 7
    for name, section in cited:
        assert re.search(rf"^## {section}", (ROOT / name).read_text(), re.M), (name, section)
