"""What must be cheap to import, in an interpreter that has imported nothing else."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import ROOT


def test_importing_the_package_is_cheap():
    code = "import sys, warm_dist; sys.exit(len({'torch', 'deepspeed', 'mlflow', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_trial_s_actor_does_without_torch():
    code = "import sys, warm_dist.sweeps.actors, warm_dist.store.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_reading_and_packing_import_no_heavy_library_before_they_need_it() -> None:
    heavy = ("boto3", "pyarrow", "webdataset", "PIL")
    code = f"import sys, data_pipelines.reading.loader, data_pipelines.pack; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
