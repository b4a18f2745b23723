"""The model of a step against sums made by hand, and limits that it must have."""

from __future__ import annotations

from itertools import pairwise

import pytest

from launch import bench
from launch.benchmarks.scaling import DGX_H100, ETHERNET, Machine, checkpoint_bytes, messages, sent_bytes, step
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


@pytest.mark.parametrize(("stage", "bf16", "fp32"), [(0, 6.0, 6.0), (1, 4.5, 9.0), (2, 4.5, 9.0), (3, 4.5, 9.0)])
def test_bytes_that_four_ranks_send(stage, bf16, fp32):
    """Fault: a stage has a pass too many or too few, or stage 0, which sends float32, is said to send bf16."""
    # 3/4 of 4 P (fp32) or 2 P (bf16) a pass: two passes of float32 at stage 0, else three
    assert sent_bytes(P, 4, stage, "bf16") == bf16 * P
    assert sent_bytes(P, 4, stage, "fp32") == fp32 * P
    assert sent_bytes(P, 1, stage, "bf16") == 0


def test_accumulation_costs_where_gradients_or_weights_are_sharded():
    passes = [round(sent_bytes(P, 2, stage, "fp32", 5) / (0.5 * 4 * P)) for stage in range(4)]
    assert passes == [2, 3, 11, 15]
    assert [messages(stage, 7, 5) for stage in range(4)] == [1, 2, 6, 105]


def test_a_checkpoint_has_master_weights_both_moments_and_every_ema():
    assert checkpoint_bytes(P, 3) == (4 + 4 + 4 + 3 * 4) * P


@pytest.mark.parametrize(("ranks", "bandwidth", "hops"), [(4, 1e9, 4), (8, 1e8, 6)])
def test_a_step_by_hand(ranks, bandwidth, hops):
    """Fault: a ring that leaves the node is given the node's bandwidth, or a part of the step is left out."""
    found = step(SLOW, config("train.batch_size=512", "train.micro_batch_size=64"), NetworkSize(P, 10, 10**9), ranks, 1)
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
    network = NetworkSize(P, 10, 10**9)
    plain, again = (
        step(SLOW, config(f"parallel.activation_checkpointing={flag}"), network, 8, 1) for flag in ("false", "true")
    )
    assert again.compute_s == pytest.approx(4 / 3 * plain.compute_s)


def test_the_size_is_the_networks():
    """Fault: the blocks that only halve or double the resolution are not counted."""
    found = size_of(config())
    assert found.flops == flops_per_image(config())
    assert found.blocks == 3 * 4 + 3 + 2 + 4 * 4 + 3  # encoder and its halvings, middle, decoder and its doublings
    assert found.parameters == pytest.approx(295.9e6, rel=1e-3)


def test_the_table_is_printed(capsys):
    """Fault: the command leaves out a stage or a number of GPUs."""
    assert call(bench.main, "scaling") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(n, s) for n in (1, 8, 64, 256, 1024) for s in range(4)]
