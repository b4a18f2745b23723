"""A checkpoint and exported weights that version 2 of the format, at commit a73f222, made of two ranks' ZeRO-1.

tests/support/format_2: six steps of tests/support/tiny_run.py with 4 channels, and in expected.json what that code's
network made of the exported weights, and the losses and gradient norms of its next two steps.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_run import ALONE, BATCH, batches, info
from warm_dist.checkpoints.format import load_saved, open_saved
from warm_dist.checkpoints.weights import export_weights, load_weights
from warm_dist.config.run import validate
from warm_dist.networks.flat import publish, published
from warm_dist.store.open import open_store
from warm_dist.training.inputs import prepare
from warm_dist.training.state import load_state
from warm_dist.training.trainer import Trainer

OLD = Path(__file__).parents[2] / "support" / "format_2"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def saved():
    return open_saved(open_store(str(OLD)), f"checkpoints/{6 * BATCH:012d}")


def test_exported_weights_give_the_output_that_they_gave():
    network = load_weights(OLD / "ema.safetensors").network
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = network(x, torch.tensor([0.1, -0.7]), torch.tensor([0.0, 0.4]), None, torch.ones(2, 9))
    torch.testing.assert_close(out.flatten()[::16], torch.tensor(EXPECTED["output"]), rtol=1e-5, atol=1e-7)


def test_its_export_is_the_one_that_was_made_then(tmp_path):
    """Fault: a layer's elements are exported in the order of memory, or a tensor under another's name."""
    export_weights([(saved(), "ema", 1.0)], tmp_path / "new.safetensors")
    then, now = load_file(OLD / "ema.safetensors"), load_file(tmp_path / "new.safetensors")
    assert then.keys() == now.keys()
    assert all(torch.equal(value, now[name]) for name, value in then.items())


def test_a_run_goes_on_from_it_as_it_would_have_gone_on():
    """Fault: a moment is in another order than its weight, or a rank's fragment is put at the wrong element."""
    config = validate(saved().meta["config"]).model_copy(update={"engine": "local"})
    trainer = Trainer(config, ALONE, info(), print)
    load_state(saved(), 0, trainer.engine, trainer.emas)
    weights = publish(trainer.engine.module, {f.name: value for f, value in zip(
        trainer.emas["ema"].fragments, trainer.emas["ema"].values, strict=True)})  # fmt: skip
    assert all(torch.equal(value, weights[name]) for name, value in load_file(OLD / "ema.safetensors").items())
    trainer.nimg = 6 * BATCH
    source = batches(ALONE, trainer.nimg)
    for loss, norm in zip(EXPECTED["next losses"], EXPECTED["next norms"], strict=True):
        trainer.step(prepare(next(source), config, info(), ALONE.device))
        assert float(trainer.metrics.sums[0] / BATCH) == pytest.approx(loss, rel=1e-5)
        trainer.metrics.sums.zero_()
        assert float(trainer.grad_norm) == pytest.approx(norm, rel=1e-4)


def test_any_part_of_a_block_is_filled():
    """A rank's share begins and ends anywhere, within a convolution too."""
    trainer = Trainer(validate(saved().meta["config"]).model_copy(update={"engine": "local"}), ALONE, info(), print)
    load_state(saved(), 0, trainer.engine, trainer.emas)
    fragment = max(trainer.engine.fragments(), key=lambda f: f.numel)
    start, stop = 101, fragment.numel - 77
    part = torch.full((stop - start,), torch.nan)
    load_saved(saved(), 1, {("master", fragment.name): [(start, part)]}, published(trainer.engine.module))
    assert torch.equal(part, fragment.master[start:stop])
