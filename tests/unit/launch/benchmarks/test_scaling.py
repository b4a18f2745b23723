"""The model of a step against sums made by hand, and limits that it must have."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from launch import bench
from launch.benchmarks.scaling import (
    DGX_H100,
    ETHERNET,
    Machine,
    Measured,
    as_measured,
    checkpoint_bytes,
    messages,
    nearest,
    sent_bytes,
    step,
)
from tests.support.commands import call
from tests.support.paths import ROOT
from warm_dist.config.run import Config, load_config
from warm_dist.networks.flops import NetworkSize, flops_per_image, size_of

P = 1_000_000
SLOW = Machine(1e12, 0.5, 1e9, 1e9, 1e8, 4, 1e-3)


def config(*changes: str) -> Config:
    return load_config(
        ROOT / "configs" / "imagenet64.json", ["train.ema_lengths=[]", "train.snapshot_nimg=null", *changes]
    )


@pytest.mark.parametrize(("stage", "bf16", "fp32"), [(0, 6.0, 6.0), (1, 4.5, 9.0), (2, 4.5, 9.0), (3, 3.0, 6.0)])
def test_bytes_that_four_ranks_send(stage, bf16, fp32):
    """Fault: a stage has a pass too many or too few, or stage 0, which sends float32, is said to send bf16."""
    # 3/4 of 4 P (fp32) or 2 P (bf16) a pass: two passes of float32 at stage 0 and two at stage 3, else three
    assert sent_bytes(P, 4, stage, "bf16") == bf16 * P
    assert sent_bytes(P, 4, stage, "fp32") == fp32 * P
    assert sent_bytes(P, 1, stage, "bf16") == 0


def test_accumulation_costs_where_gradients_or_weights_are_sharded():
    passes = [round(sent_bytes(P, 2, stage, "fp32", 5) / (0.5 * 4 * P)) for stage in range(4)]
    assert passes == [2, 3, 11, 10]
    # the root's gather, P / 50e6 others, and a reduction
    assert [messages(stage, 120_000_000, 5) for stage in range(4)] == [1, 2, 6, (1 + 3 + 1) * 5]


def test_a_large_network_is_gathered_for_the_forward_and_again_for_the_backward():
    """Fault: the weights of a network are thought kept that stage 3 does not keep."""
    assert sent_bytes(500_000_000, 2, 3, "bf16") == 2 * 500_000_000
    assert sent_bytes(500_000_002, 2, 3, "bf16") == 3 * 500_000_002
    assert messages(3, 600_000_000) == 2 * (1 + 12) + 1


def test_a_checkpoint_has_master_weights_both_moments_and_every_ema():
    assert checkpoint_bytes(P, 3) == (4 + 4 + 4 + 3 * 4) * P


@pytest.mark.parametrize(("ranks", "bandwidth", "hops"), [(4, 1e9, 4), (8, 1e8, 6)])
def test_a_step_by_hand(ranks, bandwidth, hops):
    """Fault: a ring that leaves the node is given the node's bandwidth, or a part of the step is left out."""
    found = step(SLOW, config("train.batch_size=512", "train.micro_batch_size=64"), NetworkSize(P, 10**9), ranks, 1)
    assert found.compute_s == pytest.approx(512 / ranks * 1e9 / 0.5e12)
    sent = (ranks - 1) / ranks * 3 * 2 * P  # all-reduce and all-gather of 2 bytes each
    assert found.communication_s == pytest.approx(sent / bandwidth + 2 * hops * 1e-3)
    assert found.update_s == pytest.approx(4 * (7 + 3) * P / ranks / 1e9)
    assert found.images_per_s == pytest.approx(512 / (found.compute_s + found.communication_s + found.update_s))


def test_one_rank_waits_for_nobody_and_more_ranks_never_compute_more():
    network = size_of(config())
    for machine in (DGX_H100, ETHERNET):
        for stage in range(4):
            steps = [step(machine, config(), network, ranks, stage) for ranks in (1, 8, 64, 256, 1024)]
            assert steps[0].communication_s == 0
            assert all(a.efficiency > b.efficiency for a, b in pairwise(steps))


def test_recomputation_is_one_forward_more():
    network = NetworkSize(P, 10**9)
    plain, again = (
        step(SLOW, config(f"parallel.activation_checkpointing={flag}"), network, 8, 1) for flag in ("false", "true")
    )
    assert again.compute_s == pytest.approx(4 / 3 * plain.compute_s)


def test_the_size_is_the_networks():
    """Fault: parameters or operations of another config."""
    found = size_of(config())
    assert found.flops == flops_per_image(config())
    assert found.parameters == pytest.approx(295.9e6, rel=1e-3)


def test_the_table_is_printed(capsys):
    """Fault: the command leaves out a stage or a number of GPUs."""
    assert call(bench.main, "scaling") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(n, s) for n in (1, 8, 64, 256, 1024) for s in range(4)]


def test_every_micro_batch_waits_for_the_host():
    """Fault: the host's time is counted once a step, or shrinks with the number of ranks."""
    settings, network = config("train.batch_size=512", "train.micro_batch_size=64"), NetworkSize(P, 10**9)
    for ranks, accumulations in ((1, 8), (4, 2), (64, 1)):
        plain, waiting = (step(m, settings, network, ranks, 1) for m in (SLOW, replace(SLOW, host_s=0.25)))
        assert waiting.seconds - plain.seconds == pytest.approx(accumulations * 0.25)


def figures(median: float) -> dict:
    return {"median": median, "min": median, "max": median}


def reported(*names: str, **changes: object) -> dict:
    """256 images in 4 s, of which the GPU waits a quarter."""
    row = {"mfu": 0.5, "wait_share": 0.25, "seconds": figures(4.0), "images_per_s": figures(64.0)} | changes
    facts = {"device": "a GPU", "config": "a config", "images": 256, "micro_batches": 2}
    return facts | {"rows": {name: dict(row) for name in names}}


def measured(*names: str, **rows: dict) -> Measured:
    report = reported(*names)
    report["rows"] |= rows
    return Measured.model_validate(report)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 1e13), ("fp32", 0.5e13)])
def test_a_measured_step_is_given_back(precision, peak):
    """Fault: the wait is in the MFU and beside it, and so counted twice; or an MFU of TF32's peak is taken for bf16's."""
    machine = as_measured(replace(SLOW, peak_flops=1e13), measured(f"zero1-{precision}-compiled"), 1, precision)
    assert machine.host_s == pytest.approx(0.5)
    assert machine.mfu == pytest.approx(0.5 / 0.75)
    settings = config("train.batch_size=256", "train.micro_batch_size=128", f"parallel.precision={precision}")
    flops = round(0.5 * peak * 4.0 / 256)  # of an image, so that the MFU of the whole step is 0.5
    assert step(machine, settings, NetworkSize(P, flops), 1, 1).compute_s == pytest.approx(4.0)
    assert as_measured(SLOW, None, 1, "bf16") == SLOW


def test_the_nearest_measurement_is_taken():
    """Fault: sampling or a peer stands for a training step, or another stage is nearer than eager steps of the same."""
    names = [
        "sampling-bf16",
        "diffusers-bf16",
        "local-bf16-compiled",
        "zero1-bf16-compiled",
        "zero1-fp32",
        "zero3-bf16",
    ]
    found = measured(*names)
    assert [nearest(found, stage, "bf16") for stage in (0, 1, 3)] == [
        "local-bf16-compiled",
        "zero1-bf16-compiled",
        "zero3-bf16",
    ]
    assert nearest(found, 1, "fp32") == "zero1-fp32"
    assert nearest(measured(*names, "zero0-bf16-compiled"), 0, "bf16") == "zero0-bf16-compiled"
    unknown = reported("zero3-bf16", mfu=None)["rows"]
    assert nearest(measured(*names, **unknown), 3, "bf16") != "zero3-bf16"


def test_the_table_tells_what_was_measured(tmp_path, capsys):
    """Fault: --measured is read and not used, or one stage's figures serve all."""
    plain = call(bench.main, "scaling"), capsys.readouterr().out
    path, found = tmp_path / "gpu.json", reported("zero1-bf16-compiled")
    found["rows"] |= reported("zero3-bf16", mfu=0.25)["rows"]
    path.write_text(json.dumps(found))
    assert call(bench.main, "scaling", "--measured", path) == plain[0] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "measured on a GPU: a config, 256 images a step"
    assert lines[4] == "  stage 1: MFU 0.667, and a micro-batch waits 500.0 ms, as zero1-bf16-compiled"
    assert lines[6] == "  stage 3: MFU 0.333, and a micro-batch waits 500.0 ms, as zero3-bf16"
    assert lines[-1] != plain[1].splitlines()[-1]
