"""A report of `bench.py gpu` that `scaling` is to believe: each field that cannot be true is refused by name."""

from __future__ import annotations

import json

import pytest

from launch import bench
from launch.benchmarks.scaling import read_measured
from tests.support.commands import call
from tests.unit.launch.benchmarks.test_scaling import figures, reported
from warm_dist.errors import ConfigError

NAME = "zero1-bf16-compiled"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *(({"mfu": value}, f"'rows.{NAME}.mfu': ") for value in (-0.1, 0, 1e-320, 1.5, 10**40, "0.5", True)),
        *(({"wait_share": value}, f"'rows.{NAME}.wait_share': ") for value in (-0.1, 1, 1.5)),
        *(
            ({"images_per_s": figures(value)}, f"'rows.{NAME}.images_per_s.median': ")
            for value in (0, -1.0, 1e-18, 1e200)
        ),
        ({"images_per_s": figures(-64.0)}, f"'rows.{NAME}.images_per_s.median': "),
        ({"images_per_s": figures(64.0) | {"min": 65.0}}, "median 64 is not between min 65 and max 64"),
        ({"mfu": 0.9, "wait_share": 0.5}, "mfu 0.9 in the time that wait_share 0.5 leaves is above the peak"),
    ],
)
def test_figures_that_cannot_be_true_are_refused(tmp_path, change, told):
    """Fault: a negative time or an MFU above 1 is a row of the table."""
    (tmp_path / "gpu.json").write_text(json.dumps(reported(NAME, **change)))
    with pytest.raises(ConfigError) as caught:
        call(bench.main, "scaling", "--measured", tmp_path / "gpu.json")
    assert str(caught.value).startswith(f"--measured {tmp_path}/gpu.json: '")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("null", "holds null, needs an object"),
        ("{}", "missing key 'device'"),
        (json.dumps(reported(NAME, mfu=float("nan"))), "NaN is no number here"),
        (json.dumps(reported("sampling-bf16")), "rows has no training step with an MFU"),
        (json.dumps(reported(NAME, mfu=None)), "rows has no training step with an MFU"),
        (json.dumps(reported("hello")), "'rows.hello.[key]': "),
        (json.dumps(reported(NAME) | {"rows": [1]}), "'rows': "),
        (json.dumps(reported(NAME) | {"micro_batches": 0}), "'micro_batches': "),
        (
            json.dumps(reported(NAME) | {"device": "\033[2J"}),
            "'device': needs printable characters alone, got \"\\u001b[2J\"",
        ),
    ],
)
def test_a_report_that_is_none_is_refused_by_name(tmp_path, text, told):
    """Fault: the message does not name the file, or a device's name gives orders to the terminal."""
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_measured(tmp_path / "gpu.json")
    assert f"{tmp_path}/gpu.json: {told}" in str(caught.value)


def test_what_the_report_has_besides_is_left_alone(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(reported(NAME, versions={"torch": "2"}) | {"torch": "2"}))
    assert read_measured(tmp_path / "gpu.json").steps == [NAME]
