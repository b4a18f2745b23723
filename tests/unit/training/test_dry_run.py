"""What a rank's memory holds: the state by hand, the peak of a step against a real one."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import pytest
import torch

from tests.support.tiny_run import ALONE, batches, config, info
from warm_dist.config.batch import micro_batches
from warm_dist.diffusion import spectrum
from warm_dist.networks.memory import Meter
from warm_dist.training import dry_run as module
from warm_dist.training.dry_run import Passes, forward_dtype, memory_bytes, passes, peak_bytes
from warm_dist.training.inputs import prepare
from warm_dist.training.trainer import Trainer

P = 1_000_000


@pytest.mark.parametrize(
    ("world", "stage", "options", "bytes_each"),
    [
        (1, 0, {"precision": "fp32"}, 4 + 4 + 8 + 4),
        (8, 0, {}, 4 + 4 + 8 + 4 / 8),
        (8, 1, {}, 2 + 2 + 16 / 8),
        (8, 2, {"num_emas": 3}, 2 + 2 / 8 + 24 / 8),
        (8, 3, {"num_emas": 3}, 2 / 8 + 2 / 8 + 24 / 8),
        (8, 3, {"num_emas": 3, "offload": True}, 2 / 8 + 2 / 8),
    ],
)
def test_memory_is_the_zero_papers(world, stage, options, bytes_each):
    """bf16: weights 2, gradients 2, master 4, Adam 8, each EMA 4 bytes a parameter; sharded parts an eighth.

    Fault: what a stage shards is counted whole, or what is on the host is counted on the device. Source: arXiv 1910.02054,
    section 5.
    """
    assert memory_bytes(P, world, stage, **{"precision": "bf16", **options}) == bytes_each * P


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel__precision": "bf16"},
        {"train__micro_batch_size": 8},
        {"train__micro_batch_size": 8, "parallel__precision": "bf16", "parallel__activation_checkpointing": True},
        {"parallel__activation_checkpointing": True, "train__augment": 0.3},
        {"process__preconditioning": "per_frequency", "network__arch": "ncsnpp"},
    ],
    ids=["fp32", "bf16", "accumulation", "accumulation-bf16-recompute", "recompute", "per_frequency"],
)
def test_the_peak_is_that_of_a_real_step(tmp_path: Path, changes):
    """Fault: a part of a step's memory is forgotten, or counted twice."""
    settings = config(tmp_path, engine="local", network__channels=24, **changes)
    trainer, source = Trainer(settings, ALONE, info(), lambda text: None), batches(ALONE, 0)
    trainer.step(prepare(next(source), settings, info(), ALONE.device))
    data = prepare(next(source), settings, info(), ALONE.device)
    gc.collect()
    with Meter(o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)) as meter:
        trainer.step(data)
    numbers = sum(shape.numel() for shape in trainer.shapes.values())
    real = memory_bytes(numbers, 1, 0, "fp32") - 4 * numbers + max(meter.history)[0]
    measured = passes(settings, micro_batches(settings, 1)[0], forward_dtype(settings, None), "cpu")
    assert peak_bytes(settings, 1, None, measured) == pytest.approx(real, rel=0.05)


def test_the_loss_keeps_no_fake_matrix(tmp_path: Path):
    """Fault: a step in the same process multiplies by a matrix without numbers, which the prediction left in a cache."""
    for kept in (spectrum.dct_matrix, spectrum.frequencies, spectrum.eigenvalues):
        assert isinstance(kept, functools._lru_cache_wrapper)
        kept.cache_clear()
    passes(config(tmp_path), 2, torch.float32)
    for kept in (spectrum.dct_matrix(8), spectrum.eigenvalues(8, 8, torch.device("cpu"))):
        assert type(kept) is torch.Tensor


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"precision": "bf16"}, ["buffers: a bf16 copy of the weights", "", "", "buffers: gathered weights"]),
        ({"precision": "bf16", "compile": True, "offload_optimizer": True},
         ["optimizer on the GPU", "", "", "buffers: gathered weights"]),
        ({}, ["", "", "", "buffers: gathered weights"]),
    ],
)  # fmt: skip
def test_a_stage_that_differs_says_why(tmp_path: Path, monkeypatch, changes, notes):
    """Fault: ZeRO 0's copy of the weights, or its optimizer on the device after all, is in the sums without a word."""
    settings = config(tmp_path, **{f"parallel__{key}": value for key, value in changes.items()})
    monkeypatch.setattr(module, "passes", lambda *given, **how: Passes(P, [(P, P)]))
    rows = [line for line in module.dry_run(settings, 2).splitlines() if line.startswith("  ZeRO")]
    assert [line.split(maxsplit=5)[5:] for line in rows[::2]] == [[note] if note else [] for note in notes[::2]]
    assert rows[1].endswith("  <- parallel.zero_stage")
    assert rows[3].endswith(f"  {notes[3]}")


def test_every_stage_takes_its_part(tmp_path: Path):
    """Fault: a stage's own buffers are forgotten: what it reduces at once, or the float32 gradients of its shard."""
    settings = config(tmp_path, parallel__precision="bf16", network__channels=64, train__batch_size=16)
    measured = {d: passes(settings, 1, d) for d in (torch.float32, torch.bfloat16)}
    number = measured[torch.float32].parameters
    found = {
        stage: peak_bytes(settings, 16, stage, measured[forward_dtype(settings, stage)]) / number
        for stage in (None, 0, 1, 2, 3)
    }
    # weights, Adam, 1/16 of an EMA, gradients twice; weights and twice the gradients in bf16 with 1/16 of 16;
    # 1/16 of weights, gradients and 16, a bucket, and gradients twice
    by_hand = {None: 4 + 8 + 0.25 + 8, 0: 4 + 8 + 0.25 + 8, 1: 2 + 1 + 4, 2: 2 + 1 + 4, 3: 20 / 16 + 2 + 4}
    assert found == pytest.approx(by_hand, rel=0.03)
