"""The walls of the house: who may import whom, and gates that must gate."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LEVELS = [
    {"errors", "types", "bnr"},
    {"config", "rng", "spectrum", "owned"},
    {
        "config_file",
        "process",
        "distributed",
        "augment",
        "analysis",
        "prometheus",
        "stopwatch",
        "system",
        "uploads",
        "downloads",
        "lite0",
    },
    {"blocks", "metrics", "mlflow_client", "prefetch", "finite", "sweep_config"},
    {
        "networks",
        "precond",
        "engine",
        "tracking",
        "logged_model",
        "run_folder",
        "heartbeat",
        "posthoc",
    },
    {"loss", "per_frequency", "sampler", "ema", "flops", "edm_weights"},
    {"checkpoint", "extractors", "fid", "figures", "guidance", "row_metrics", "window", "scaling"},
    {"feature_stream", "generate", "spectrum_figure", "storage", "plan", "surface", "sweep_results"},
    {"mlflow_model", "preparation", "reference", "sweep_axes", "space"},
    {"evaluation", "trial", "sweep_figures", "ledger", "ray_cluster"},
    {"trainer", "report_charts", "report_facts", "sweep_actors"},
    {"report", "sweep", "manifests"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
MLFLOW = ("warm_dist/tracking/client.py", "warm_dist/tracking/model.py", "warm_dist/tracking/mlflow_model.py")
ONLY_IN = {"deepspeed": "warm_dist/config/batch.py", "mlflow": MLFLOW, "cleanfid": "warm_dist/evaluation/extractors.py",
           "boto3": "warm_dist/store/s3.py", "botocore": "warm_dist/store/s3.py",
           "prometheus_client": "warm_dist/tracking/prometheus.py", "ray": ("warm_dist/sweeps/tune.py", "warm_dist/sweeps/actors.py", "warm_dist/sweeps/ray_cluster.py")}  # fmt: skip
HEAVY = {
    "deepspeed",
    "mlflow",
    "ray",
    "cleanfid",
    "matplotlib",
    "jinja2",
    "pyarrow",
    "boto3",
    "webdataset",
    "sklearn",
    "prometheus_client",
}
LOADED_LATE = (
    "warm_dist/tracking/mlflow_model.py",
    "warm_dist/sweeps/actors.py",
)  # a script of MLflow's; Ray's workers' module
SOURCES = [
    path for package in ("warm_dist", "data_pipelines", "launch") for path in sorted((ROOT / package).glob("*.py"))
]


def imports(path: Path, top_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    out = []
    for node in nodes:
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return out


def modules_of(names: list[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("warm_dist.")} & LEVEL.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "warm_dist").glob("*.py")), ids=lambda path: path.stem)
def test_warm_dist_imports_point_down(path):
    if path.stem == "__init__":
        assert imports(path) == []
        return
    assert path.stem in LEVEL, f"{path.name} has no level: add it to the ladder"
    names = imports(path)
    assert not [name for name in names if name.startswith(("data_pipelines", "launch"))]
    upward = {name for name in modules_of(names) if LEVEL[name] >= LEVEL[path.stem]}
    assert not upward, f"{path.stem} (level {LEVEL[path.stem]}) imports {upward}"


@pytest.mark.parametrize("path", sorted((ROOT / "data_pipelines").glob("*.py")), ids=lambda path: path.stem)
def test_data_pipelines_know_only_the_ground_floors(path):
    assert all(LEVEL[name] <= 1 for name in modules_of(imports(path)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_libraries_have_one_home_and_heavy_ones_are_lazy(path):
    name = str(path.relative_to(ROOT))
    for library, home in ONLY_IN.items():
        if name not in ((home,) if isinstance(home, str) else home):
            assert library not in {found.split(".")[0] for found in imports(path)}, f"{library} belongs in {home}"
    if name not in LOADED_LATE:
        assert not {found.split(".")[0] for found in imports(path, top_only=True)} & HEAVY


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_one_file_one_idea(path):
    assert len(path.read_text().splitlines()) <= 350


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


def test_the_lock_holds_what_pyproject_asks_for():
    lock = (ROOT / "requirements.lock").read_text().lower()
    asked = re.findall(r'^    "([A-Za-z0-9_.-]+)[\[=<>~ "]', (ROOT / "pyproject.toml").read_text(), re.M)
    packages = [name for name in asked if not re.fullmatch(r"E|E501|RUF00\d", name)]
    assert len(packages) > 20
    assert not [name for name in packages if not re.search(rf"^{re.escape(name.lower())}==", lock, re.M)]
