"""What the quickstart prints at its end."""

from __future__ import annotations

from pathlib import Path

from launch import quickstart
from warm_dist.runs.metrics import MetricsLog


def test_the_report_compares_equal_specs(tmp_path: Path) -> None:
    run = quickstart.Quickstart(
        tmp_path, quickstart.LAUNCH.parent / "configs/quickstart.json", [f"output={tmp_path}/q"], 2
    )
    run.output.mkdir()
    metrics = MetricsLog(run.output / "metrics.jsonl", 1)
    common = {"floor": 15.0, "floor_n": 1230, "name": "Fréchet distance (lite0)", "seconds": 9.0}
    metrics.write(0, "eval", frechet=999.0, spec="other", grid="samples/0.png", **common)
    metrics.write(32, "eval", frechet=215.0, spec="same", grid="samples/32.png", **common)
    for nimg, rate in ((64, 100.0), (96, 300.0), (128, 200.0)):
        metrics.write(nimg, "train", loss=1.0, images_per_s=rate)
    metrics.write(128, "eval", frechet=65.0, spec="same", grid="samples/128.png", **common)
    run.seconds = {"services": 1.0, "train": 2.0}
    report = run._report(3.0)
    for part in (
        "services 1.0 s   train 2.0 s   200 images/s",
        "Fréchet distance (lite0), n = 2,048, ancestral 35 steps, spec same",
        "before training   215.00   (nimg 32)",
        "after training     65.00   (nimg 128)",
        "floor              15.00   (real against real, 1,230 images against the others)",
        "excess over the floor: 25.0 %",
        f"{run.output}/samples/128.png",
        "make ui",
    ):
        assert part in report


def test_the_precision_is_the_devices_unless_the_config_decides(tmp_path, monkeypatch):
    """Fault: a processor without bfloat16 emulates it, or the choice overrules the user's config."""
    from warm_dist.networks import precision

    path = tmp_path / "config.json"
    for config, has, expected in (("{}", True, ["parallel.precision=bf16"]), ("{}", False, []),
                                  ('{"parallel": {"precision": "fp32"}}', True, [])):  # fmt: skip
        monkeypatch.setattr(precision, "has_bf16", lambda device, has=has: has)
        path.write_text(config)
        assert quickstart.precision(path) == expected
