"""MLflow's own pages on our runs, in a headless browser: `make soak`; the pictures go to the folder that pytest names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch.services import Services
from tests.support.browser import chromium
from tests.support.paths import ROOT
from tests.support.zygote import zygote
from warm_dist.files import read_json
from warm_dist.runs.metrics import read_metrics

if TYPE_CHECKING:
    from tests.support.packed import Packed

pytestmark = pytest.mark.soak
BNRS = (0.1, 2.0)


@pytest.fixture(scope="module")
def runs(running: Services, config_file: Path, digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained runs of different BNR, mirrored to the end, and one's surface."""
    root = tmp_path_factory.mktemp("runs")
    folders = [root / f"bnr-{bnr:g}" for bnr in BNRS]
    for bnr, run in zip(BNRS, folders, strict=True):
        settings = [f"output={run}", "engine=local", f"process.bnr={bnr}", "train.total_nimg=4800", "train.log_nimg=160",
                    "train.save_nimg=4800", f"tracking.mlflow_url={running.mlflow_url}", "tracking.experiment=pages",
                    'eval={"eval_nimg":1600,"num_images":256,"extractor":"pixels"}', "sampler.num_steps=8"]  # fmt: skip
        command("train", "--config", str(config_file), *(f"--set={text}" for text in settings))
    for run in folders:
        command("mirror", str(run))  # waits for the run's own
    command("evaluate", str(folders[0]), "--nfe", "5,9", "--bnr", "0,0.1,1", "--num-images", "128",
            "--blocks", "2", "--out", str(root / "surface"))  # fmt: skip
    return folders


def command(name: str, *arguments: str) -> str:
    done = zygote().run(ROOT / "launch" / f"{name}.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_ids(runs: list[Path]) -> list[str]:
    return [read_json(run / "mirror.json")["run_id"] for run in runs]


def wait_for(driver: Any, condition: Callable[[str], Any]) -> str:
    """The page's text, when it meets the condition."""
    deadline = time.monotonic() + 60
    while not condition(text := driver.find_element("tag name", "body").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return text


def picture(driver: Any, path: Path) -> None:
    driver.save_screenshot(str(path))
    print(f"picture: {path}")
    assert path.stat().st_size > 20_000


def test_the_compare_page_shows_what_differs(running: Services, runs: list[Path], tmp_path: Path) -> None:
    """Fault: process.bnr or log10_bnr not sent as a parameter of its own."""
    query = f"runs={json.dumps(run_ids(runs), separators=(',', ':'))}&experiments=[%221%22]"
    with chromium(1600, 2400) as driver:
        driver.get(f"{running.mlflow_url}/#/compare-runs?{query}")
        text = wait_for(driver, lambda text: "Show diff only" in text and "eval/frechet" in text)
        assert "Comparing 2 Runs" in text
        assert all(run.name in text for run in runs)
        assert "log10_bnr" in text, "an axis of the parallel coordinates"
        assert "0.30100" in text, "of BNR 2"
        for switch in driver.find_elements("css selector", "button[role=switch]"):
            switch.click()  # show diff only
        text = wait_for(driver, lambda text: "train.lr" not in text)
        assert {"process.bnr", "log10_bnr"} <= set(text.split())
        driver.execute_script("document.querySelectorAll('*').forEach(e => e.scrollTop = 0)")
        picture(driver, tmp_path / "compare.png")


def test_a_runs_page_shows_metrics_pictures_load_and_evaluation(
    running: Services, runs: list[Path], tmp_path: Path
) -> None:
    """Fault: a picture, a system metric or a child run under a name that MLflow's pages do not look for."""
    run, run_id = runs[0], run_ids(runs)[0]
    page = f"{running.mlflow_url}/#/experiments/1/runs/{run_id}"
    last = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "eval"][-1]
    with chromium(1600, 6000) as driver:
        driver.get(page)
        text = wait_for(driver, lambda text: "eval/frechet" in text and "process.bnr" in text)
        assert f"{last['frechet']:.4f}" in text
        assert "Finished" in text
        assert "evaluate-bnr-0.1" in text, "the surface is a child run"
        assert "system/cpu_utilization_percentage" in text
        picture(driver, tmp_path / "overview.png")
        driver.get(f"{page}/model-metrics")
        wait_for(driver, lambda text: "samples" in text and "eval/frechet" in text)
        shown = "return [...document.images].filter(i => i.naturalWidth > 200).length"
        deadline = time.monotonic() + 60
        while not driver.execute_script(shown):
            assert time.monotonic() < deadline, "the sample grid is a picture"
            time.sleep(0.5)
        picture(driver, tmp_path / "metrics.png")
        driver.get(f"{page}/system-metrics")
        wait_for(driver, lambda text: "cpu_utilization_percentage" in text and "disk_usage_percentage" in text)
        picture(driver, tmp_path / "system.png")
