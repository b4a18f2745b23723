"""What must be cheap to start: each in an interpreter that has imported nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from tests.support.paths import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "def main() -> int" in path.read_text())
TOOLS = ("pack", "index", "verify", "info")
REPORT = "; import sys; print(sorted({name.split('.')[0] for name in sys.modules}))"


def modules_after(code: str) -> set[str]:
    """The top-level modules that are loaded once this code has run."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(eval(done.stdout.strip().splitlines()[-1]))


def test_importing_the_package_is_cheap():
    assert not {"torch", "deepspeed", "mlflow", "numpy"} & modules_after("import warm_dist")


def test_a_trial_s_actor_does_without_torch():
    loaded = modules_after("import warm_dist.sweeps.actors, warm_dist.store.open")
    assert "ray" in loaded
    assert "torch" not in loaded


def test_reading_and_packing_load_no_heavy_library_before_they_need_it():
    loaded = modules_after("import data_pipelines.reading.loader, data_pipelines.pack")
    assert not {"torch", "boto3", "pyarrow", "webdataset", "PIL", "pandas"} & loaded


@pytest.mark.parametrize(
    "module", [f"launch.{name}" for name in COMMANDS] + [f"data_pipelines.{name}" for name in TOOLS]
)
def test_help_loads_no_torch(module):
    """Whoever asks for help waits for it: torch takes two seconds."""
    code = (
        f"import sys, importlib; sys.argv = ['x', '--help']\n"
        f"try: importlib.import_module({module!r}).main()\n"
        "except SystemExit as end: assert not end.code\n"
        "else: assert False, 'no help'\n"
        "pass"
    )
    assert not {"torch", "deepspeed", "mlflow", "ray", "matplotlib"} & modules_after(code.replace("pass", "None"))


def test_a_packing_process_has_no_torch_and_little_memory(tmp_path):
    """59 MB at its start, 148 when it has written tar and manifest; 641 with torch."""
    for number in range(8):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    code = (
        "import sys\n"
        "from data_pipelines.pack import main\n"
        f"sys.argv = ['pack', {str(tmp_path)!r}, {str(tmp_path / 'out')!r}, '--resolution', '16', '--workers', '1']\n"
        "assert main() == 0\n"
        "import psutil\n"
        "assert psutil.Process().memory_info().rss < 300e6\n"
        "None"
    )
    loaded = modules_after(code)
    assert "webdataset" in loaded
    assert "torch" not in loaded
