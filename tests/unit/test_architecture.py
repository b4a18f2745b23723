"""The walls: who may import whom, one home for each library, files and packages that fit a head, gates that gate."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROWS = ("errors rng supervisor data", "files", "config distributed figures", "store runs diffusion networks",
        "checkpoints report", "evaluation", "tracking", "training sweeps", "kubernetes")  # fmt: skip
ROW = {name: row for row, names in enumerate(ROWS, 1) for name in names.split()}
PACKING = {"config", "store", *(name for name, row in ROW.items() if row <= 2)}  # what data_pipelines may import
HOMES = {
    "boto3": "warm_dist/store/s3.py",
    "botocore": "warm_dist/store/s3.py",
    "deepspeed": "warm_dist/training/deepspeed_engine.py",
    "mlflow": "warm_dist/tracking/(client|model|mlflow_model).py",
    "ray": "warm_dist/sweeps/(tune|actors|ray_cluster).py",
    "cleanfid": "warm_dist/evaluation/extractors.py",
    "prometheus_client": "warm_dist/tracking/prometheus.py",
}
HEAVY = {*HOMES, "matplotlib", "jinja2", "pyarrow", "webdataset", "sklearn", "pandas"}
READ_LATE = (
    "warm_dist/tracking/mlflow_model.py",
    "warm_dist/sweeps/actors.py",
)  # MLflow's script; read inside Ray's workers
LINES, FILES, DEPTH = 350, 13, 10


class House:
    """The Python files below a folder and what each imports."""

    def __init__(self, root: Path) -> None:
        self.paths = {
            str(path.relative_to(root)): path
            for package in ("warm_dist", "data_pipelines", "launch")
            for path in sorted((root / package).rglob("*.py"))
        }
        self.modules = {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in self.paths
        }
        trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.paths.items()}
        self.named = {name: _imports(ast.walk(tree)) for name, tree in trees.items()}
        self.at_top = {name: _imports(iter(tree.body)) for name, tree in trees.items()}
        self.ours = {
            name: {self.modules[m] for m in found if m in self.modules} - {name} for name, found in self.named.items()
        }

    def upward(self) -> list[str]:
        """Imports that do not point to a lower row, into the own package, or from launch."""
        out = []
        for name, found in self.ours.items():
            top, own = name.split("/")[0], _part(name)
            for other in found:
                there, part = other.split("/")[0], _part(other)
                if top == "warm_dist":
                    fine = there == top and (part == own or not part or (own in ROW and ROW.get(part, 99) < ROW[own]))
                else:
                    fine = top == "launch" or there == top or (there == "warm_dist" and (not part or part in PACKING))
                out += [] if fine else [f"{name} imports {other}"]
        return sorted(out)

    def homeless(self) -> list[str]:
        """Libraries outside their home, and heavy ones at the top of a file."""
        out = []
        for name in (name for name in self.paths if not name.startswith("launch/benchmarks/peers/")):
            libraries = {module.split(".")[0] for module in self.named[name]}
            out += [f"{name} imports {one}" for one in libraries & HOMES.keys() if not re.fullmatch(HOMES[one], name)]
            if name not in READ_LATE:
                early = {module.split(".")[0] for module in self.at_top[name]} & HEAVY
                out += [f"{name} imports {one} at its top" for one in early]
        return sorted(out)

    def longest_chain(self) -> list[str]:
        """The deepest chain of imports. Raises ValueError for a circle, with its members."""

        @cache
        def below(name: str) -> tuple[str, ...]:
            if name in open_:
                raise ValueError(f"a circle: {' -> '.join([*open_[open_.index(name) :], name])}")
            open_.append(name)
            deepest = max((below(other) for other in sorted(self.ours[name])), key=len, default=())
            open_.pop()
            return name, *deepest

        open_: list[str] = []
        return list(max((below(name) for name in self.paths), key=len))


def _part(name: str) -> str:
    """The package, or file, directly below the top one; empty for the top one's own __init__.py."""
    return name.split("/")[1].removesuffix(".py").removesuffix("__init__")


def _imports(nodes: object) -> set[str]:
    out: set[str] = set()
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return out


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


def test_imports_point_down(house):
    assert {_part(name) for name in house.paths if name.startswith("warm_dist/")} - {""} == ROW.keys(), "each has a row"
    assert house.upward() == []


def test_libraries_have_one_home_and_heavy_ones_are_imported_late(house):
    assert house.homeless() == []


def test_there_is_no_circle_and_no_long_chain(house):
    chain = house.longest_chain()
    assert len(chain) <= DEPTH, chain


def test_files_and_packages_are_small(house):
    long = {name: lines for name, path in house.paths.items() if (lines := path.read_text().count("\n")) > LINES}
    assert not long
    folders = [Path(name).parent.as_posix() for name in house.paths if not name.startswith("launch/")]
    assert {folder: n for folder in set(folders) if (n := folders.count(folder)) > FILES} == {}


PLANTED = {
    "upward": ("warm_dist/store/base.py", "from warm_dist.training import trainer", "store/base.py imports warm_dist/training/trainer.py"),
    "beside": ("warm_dist/runs/folder.py", "from warm_dist.store import base", "runs/folder.py imports warm_dist/store/base.py"),
    "packing": ("data_pipelines/pack.py", "from warm_dist.networks import unet", "pack.py imports warm_dist/networks/unet.py"),
    "foreign": ("warm_dist/training/inputs.py", "from data_pipelines.reading.loader import Loader", "imports data_pipelines"),
    "second home": ("warm_dist/runs/metrics.py", "import boto3", "runs/metrics.py imports boto3"),
    "early": ("warm_dist/store/s3.py", "import boto3", "store/s3.py imports boto3 at its top"),
    "circle": ("warm_dist/store/base.py", "def f():\n    from warm_dist.store import open", "a circle: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, tmp_path):
    for name in ("warm_dist", "data_pipelines"):
        for path in (ROOT / name).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    name, text, told = PLANTED[fault]
    with (tmp_path / name).open("a") as file:
        file.write(f"\n{text}\n")
    planted = House(tmp_path)
    found = planted.upward() + planted.homeless()
    try:
        planted.longest_chain()
    except ValueError as error:
        found.append(str(error))
    assert any(told in line for line in found), found


def test_paths_that_the_gates_name_exist():
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "Makefile", ".ci/run")}
    named = set(
        re.findall(r"\b((?:launch|tests|configs|warm_dist|data_pipelines)/[\w./-]+)", "\n".join(texts.values()))
    )
    named |= set(re.search(r"^files = \[(.*)\]$", texts["pyproject.toml"], re.M)[1].replace('"', "").split(", "))
    named |= {"requirements.lock", "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert not [path for path in named if not (ROOT / path).exists()]
    targets = set(re.findall(r"^([a-z]+):", texts["Makefile"], re.M))
    assert set(re.findall(r"^make (\w+)", texts[".ci/run"], re.M)) == {"install", "lint", "debian", "test"} <= targets


def test_the_build_finds_every_package():
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=["warm_dist*", "data_pipelines*", "launch*"]))
    folders = {
        path.parent for name in ("warm_dist", "data_pipelines", "launch") for path in (ROOT / name).rglob("*.py")
    }
    assert found == {path.relative_to(ROOT).as_posix().replace("/", ".") for path in folders}
    assert (
        'packages.find = { include = ["warm_dist*", "data_pipelines*", "launch*"] }'
        in (ROOT / "pyproject.toml").read_text()
    )


def test_the_lock_holds_what_pyproject_asks_for():
    lock = (ROOT / "requirements.lock").read_text().lower()
    asked = re.findall(r'^    "([A-Za-z0-9_.-]+)[\[=<>~ "]', (ROOT / "pyproject.toml").read_text(), re.M)
    packages = [name for name in asked if not re.fullmatch(r"E|E501|RUF00\d", name)]
    assert len(packages) > 20
    assert not [name for name in packages if not re.search(rf"^{re.escape(name.lower())}==", lock, re.M)]
