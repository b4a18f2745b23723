"""The report of `bench.py host`: ratios round by round, and what they are compared with."""

from launch.benchmarks.host import report, settings, table


def test_a_ratio_is_taken_within_its_round_and_precision():
    """Fault: the median of one engine over the median of another, or fp32 beside bf16."""
    found = report(
        {"local fp32": [10, 20, 40], "local bf16": [1, 1, 1], "zero1 fp32": [11, 21, 48], "zero3 fp32": [9, 9, 9]}
    )
    assert found["ratios"].keys() == {"zero1 fp32", "zero3 fp32"}
    assert found["ratios"]["zero1 fp32"] == {"median": 1.1, "min": 1.05, "max": 1.2, "target": 1.1, "met": True}
    assert found["ms"]["zero1 fp32"]["median"] == 21
    assert not report({"local fp32": [10], "zero1 fp32": [12]})["ratios"]["zero1 fp32"]["met"]
    text = table(found | {"inputs": {"cifar10": {"median": 24400.4, "min": 22900, "max": 28300}}})
    assert "1.1: met" in text
    assert text.splitlines()[-1].split() == ["cifar10", "24400", "22900..28300"]


def test_an_engine_without_its_local_one_has_no_ratio():
    assert report({"zero2 bf16": [5]})["ratios"] == {}


def test_contenders_differ_in_engine_and_precision_alone(tmp_path):
    local, sharded = (settings(engine, "bf16", str(tmp_path), []) for engine in ("local", "zero2"))
    assert (local.engine, sharded.engine, sharded.parallel.zero_stage) == ("local", "deepspeed", 2)
    assert local.parallel.precision == "bf16"
    assert local.network == sharded.network
    assert settings("local", "fp32", str(tmp_path), ["network.channels=4"]).network.channels == 4
