"""Images from weights: each is its seed and number, guidance, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.networks import wake, weight
from tests.support.tiny_run import config, info
from warm_dist import rng
from warm_dist.checkpoints.weights import Model, load_guide
from warm_dist.config.load import dump
from warm_dist.config.run import SamplerConfig
from warm_dist.diffusion.heads import Heads
from warm_dist.diffusion.spectrum import dct, eigenvalues
from warm_dist.errors import CheckpointError, ConfigError, NumericsError
from warm_dist.evaluation import generate as generate_module
from warm_dist.evaluation.generate import StepNoise, draw_labels, fitting_batch, generate, sample_labels
from warm_dist.networks.flat import publish
from warm_dist.networks.unet import build_network

CPU = torch.device("cpu")
SAMPLER = SamplerConfig(num_steps=4)


def images(tmp_path: Path, indices, batch_size: int, seed: int = 0, sampler=SAMPLER, **changes) -> np.ndarray:
    settings = config(tmp_path, **changes)
    network = build_network(settings)
    labels = np.full(len(indices), -1)
    model = Model(network, settings, info())
    return generate(model, indices, labels, seed=seed, device=CPU, batch_size=batch_size, sampler=sampler)


def test_an_image_is_its_seed_and_number(tmp_path):
    whole = images(tmp_path, range(6), batch_size=4).astype(int)
    part = images(tmp_path, [4, 1], batch_size=2).astype(int)
    assert np.abs(part - whole[[4, 1]]).max() <= 1  # another batch size may round the last bit
    assert np.abs(images(tmp_path, range(6), 4, seed=1).astype(int) - whole).max() > 10


def test_a_network_in_training_is_sampled_without_dropout(tmp_path):
    settings = config(tmp_path, network__dropout=0.5)
    model = Model(wake(build_network(settings)).train(), settings, info())
    options = {"seed": 0, "device": CPU, "batch_size": 2, "sampler": SAMPLER}
    one, other = (generate(model, range(2), np.full(2, -1), **options) for _ in range(2))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("bnr", [0.5, {"kind": "cold"}], ids=["warm", "cold"])
def test_whatever_is_drawn_has_a_stream_of_its_own_under_the_images_seed_and_numbers(tmp_path, bnr, monkeypatch):
    """Fault: a random step adds the noise of the start, or of the step before, again."""
    asked, generators = [], rng.generators

    def watched(seed, purpose, indices):
        asked.append((seed, purpose, list(indices)))
        return generators(*asked[-1])

    monkeypatch.setattr(rng, "generators", watched)
    images(tmp_path, [4, 1], batch_size=2, seed=5, process__bnr=bnr)
    sample_labels(5, [4, 1], 10)
    drawn = [(seed, purpose, indices) for seed, purpose, indices in asked if indices != [0]]  # that of the weights
    assert [(seed, indices) for seed, _, indices in drawn] == [(5, [4, 1])] * len(drawn)
    assert len({purpose for _, purpose, _ in drawn}) == len(drawn) >= 6, "classes, the start and four steps"


def test_the_noise_of_steps_and_start_is_white(tmp_path):
    with StepNoise(0, range(500), (1, 2, 2), CPU) as noise:
        steps = [noise(step).flatten(1) for step in range(3)]
    columns = torch.cat([*steps, torch.from_numpy(rng.normals(0, "sample", range(500), (1, 2, 2))).flatten(1)], 1)
    torch.testing.assert_close(
        columns.T @ columns / 500, torch.eye(16).double(), rtol=0, atol=0.25
    )  # 4 standard errors


def test_each_image_is_of_its_own_class_in_every_batch(tmp_path):
    model, seen = with_classes(tmp_path, 0), []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[3].tolist()))
    options = {"seed": 0, "device": CPU, "sampler": SamplerConfig(num_steps=2, method="first_order")}
    generate(model, range(5), np.array([3, 1, 2, 0, -1]), batch_size=2, **options)
    assert seen == [[3, 1]] * 2 + [[2, 0]] * 2 + [[-1]] * 2


def test_the_data_s_channel_means_are_added_at_the_end(tmp_path):
    settings, sampler = config(tmp_path), SamplerConfig(num_steps=2, start="plain")
    network, options = build_network(settings), {"seed": 0, "device": CPU, "batch_size": 2, "sampler": sampler}
    brighter = replace(info(), channel_mean=np.array([0.2, 0.0, -0.1]))
    dull, bright = (
        generate(Model(network, settings, data), [0, 1], np.full(2, -1), **options).astype(float)
        for data in (info(), brighter)
    )
    inside = (np.minimum(dull, bright) > 0) & (np.maximum(dull, bright) < 255)
    assert inside.mean() > 0.5
    added = np.array([0.2, 0.0, -0.1])[:, None, None] * 127.5
    assert np.abs(np.where(inside, bright - dull - added, 0)).max() <= 1


@pytest.mark.parametrize(
    ("bnr", "start", "std"),
    [
        (0.0, "plain", 0.1),
        (0.0, "measured", (0.25 + 0.1**2) ** 0.5),
        ({"kind": "cold"}, "plain", 0.02),
        # a cold start has 0.25 in each of the lowest 4 by 4 modes, blurred by 4 of 8 pixels
        ({"kind": "cold"}, "measured",
         (0.25 * sum(math.exp(-((math.pi * k / 8) ** 2) * 16) for k in range(4)) ** 2 / 64 + 0.02**2) ** 0.5),
    ],
)  # fmt: skip
def test_images_start_as_the_config_says(tmp_path, bnr, start, std):
    settings, seen = config(tmp_path, process__bnr=bnr), []
    sampler = SamplerConfig(num_steps=2, sigma_min=0.01, sigma_max=0.1, start=start, method="first_order")
    model, numbers = Model(build_network(settings), settings, info()), range(100)
    generate(model, numbers, np.full(100, -1), seed=0, device=CPU, batch_size=100, sampler=sampler,
             watch=lambda *given: seen.append(given[0]))  # fmt: skip
    assert float(seen[0].std()) == pytest.approx(std, rel=0.15)  # 4 standard errors where few modes are left


def test_a_batch_that_is_filled_up_has_the_same_images_and_one_shape(tmp_path):
    """Fault: a compiled network is compiled once more for the last, smaller batch of every evaluation."""
    settings, shapes = config(tmp_path), set()
    network = build_network(settings)
    network.register_forward_pre_hook(lambda module, args: shapes.add(tuple(len(arg) for arg in args[:2])))
    options = {"seed": 0, "device": CPU, "sampler": SAMPLER}
    model, labels = Model(network, settings, info()), np.full(5, -1)
    filled = generate(model, range(5), labels, batch_size=4, fill=True, **options)
    assert shapes == {(4, 4)}
    assert np.abs(filled.astype(int) - generate(model, range(5), labels, batch_size=4, **options)).max() <= 1


@pytest.mark.parametrize(("free_gib", "expected"), [(4, 128), (8, 256), (15, 256), (4000, 512), (0.001, 1)])
def test_a_gpu_samples_as_many_images_as_fit_into_half_of_what_is_free(tmp_path, monkeypatch, free_gib, expected):
    """Fault: a large GPU samples 64 images at a time, or one that training has filled runs out of memory."""
    settings = config(tmp_path)
    assert fitting_batch(settings, "bf16", CPU, 10**6) == 64
    monkeypatch.setattr(
        generate_module, "forward_bytes_per_image", lambda config, dtype: {torch.bfloat16: 2**24}[dtype]
    )
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * gib / 2), 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(free_gib * gib / 2) + 3 * gib)  # free as well
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * gib)
    assert fitting_batch(settings, "bf16", torch.device("cuda"), 10**6) == expected
    assert fitting_batch(settings, "bf16", torch.device("cuda"), 64) == 64  # a few images need no prediction


def test_the_noise_of_the_next_step_is_drawn_while_this_one_is_used():
    """Fault: the sampler waits for every draw, or is given that of another step."""
    with StepNoise(3, [7, 2], (1, 2, 2), CPU) as noise:
        for step in (0, 1, 4):
            expected = torch.from_numpy(rng.normals(3, f"sample step {step}", [7, 2], (1, 2, 2))).double()
            assert torch.equal(noise(step), expected)
            assert noise._ahead[step + 1].result(timeout=60) is not None


def test_a_sampler_computes_in_its_own_precision_or_that_of_training(tmp_path):
    """Fault: a network trained in bfloat16 is sampled at half its speed, or one asked for in float32 is not."""
    seen = []
    for trained, asked in (("fp32", None), ("bf16", None), ("bf16", "fp32"), ("fp32", "bf16")):
        settings = config(tmp_path, parallel__precision=trained)
        network = build_network(settings)
        network.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        sampler = SamplerConfig(num_steps=2, method="first_order", precision=asked)
        generate(
            Model(network, settings, info()), [0], np.array([-1]), seed=0, device=CPU, batch_size=1, sampler=sampler
        )
    half, single = torch.bfloat16, torch.float32
    assert seen == [single] * 2 + [half] * 2 + [single] * 2 + [half] * 2


@pytest.mark.parametrize(
    ("bnr", "sampler"),
    [
        (0.5, SamplerConfig(num_steps=4, method="heun")),
        (0.5, SamplerConfig(num_steps=4, method="multistep", grid="log_linear")),
        (0.5, SamplerConfig(num_steps=4, method="churn")),
        (0.5, SamplerConfig(num_steps=4, method="ancestral", eta=0.5, start="plain")),
        ({"kind": "uniform", "low": 0, "high": 2}, SamplerConfig(num_steps=4, bnr=1.0)),
        ({"kind": "power", "bnr": 0.5, "exponent": 0.2}, SamplerConfig(num_steps=3, grid=(9.0, 1.0, 0.1))),
        ({"kind": "cold"}, SamplerConfig(num_steps=4)),
        ({"kind": "cold"}, SamplerConfig(num_steps=4, method="cold")),
        ({"kind": "cold"}, SamplerConfig(num_steps=4, method="churn", start="plain")),
    ],
)
def test_every_way_to_sample_draws_an_image_from_its_seed_and_number(tmp_path, bnr, sampler):
    changes = {"process__bnr": bnr, "sampler__bnr": sampler.bnr}
    whole = images(tmp_path, range(4), 3, sampler=sampler, **changes).astype(int)
    part = images(tmp_path, [3, 1], 2, sampler=sampler, **changes).astype(int)
    assert np.abs(part - whole[[3, 1]]).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 10


def test_what_a_network_cannot_do_is_refused(tmp_path):
    cold = {"process__bnr": {"kind": "cold"}}
    for sampler, words, changes in [
        (SamplerConfig(bnr=0.5), "no meaning", cold),
        (SamplerConfig(method="cold"), "needs process.bnr cold", {}),
        (SamplerConfig(guidance=2.0), "train.label_dropout", {}),
    ]:
        with pytest.raises(ConfigError, match=words):
            images(tmp_path, range(2), 2, sampler=sampler, **changes)


@pytest.mark.parametrize("preconditioning", ["two_head", "per_frequency"])
def test_the_heads_of_a_silent_network_are_its_preconditioning_s_skips(tmp_path, preconditioning):
    """Fault: the ablation is sampled as two heads, or with another spectrum than the data's, here 0.25 in every mode."""
    settings = config(tmp_path, process__preconditioning=preconditioning, process__sigma_data="measured")
    model, seen = Model(build_network(settings), settings, info()), []
    for name in ("conv_out.weight", "conv_out.bias"):
        weight(model.network, name).zero_()
    sampler = SamplerConfig(num_steps=2, sigma_max=2.0, method="first_order")
    generate(model, [0], np.full(1, -1), seed=0, device=CPU, batch_size=1, sampler=sampler,
             watch=lambda *given: seen.append(given))  # fmt: skip
    x, level, heads = seen[0]
    assert (float(level.sigma), float(level.alpha)) == pytest.approx((2.0, 1.0))
    a = torch.exp(-eigenvalues(8, 8) / 2)
    if preconditioning == "per_frequency":
        skip = a * 0.25 / (a**2 * 0.25 + 4)
        expected = a * skip, (1 - a) * skip
    else:
        power = 0.25 * (a**2).mean() + 4
        expected = 0.25 * (a**2).mean() / power, 0.25 * (a * (1 - a)).mean() / power
    for ours, gain in zip(heads, expected, strict=True):
        torch.testing.assert_close(dct(ours), gain * dct(x))


def guided_heads(model: Model, guide: Model | None, weight: float, label: int) -> Heads:
    """The first evaluation of a guided sampler, seen from outside."""
    seen: list[Heads] = []
    sampler = SamplerConfig(num_steps=2, guidance=weight, guide="somewhere" if guide else None)
    generate(model, [0], np.full(1, label), seed=0, device=CPU, batch_size=1, sampler=sampler, guide=guide,
             watch=lambda x, level, heads: seen.append(heads))  # fmt: skip
    return seen[0]


def with_classes(tmp_path: Path, seed: int) -> Model:
    settings = config(tmp_path, data__num_classes=4, train__label_dropout=0.1, train__seed=seed)
    network = build_network(settings)
    torch.nn.init.normal_(weight(network, "conv_out.weight"), std=0.1)  # untrained, it would hardly know of classes
    return Model(network, settings, info())


def test_guidance_extrapolates_both_heads_away_from_no_class_or_a_weaker_network(tmp_path):
    model, weaker = with_classes(tmp_path, 0), with_classes(tmp_path, 1)
    for guide, low in ((None, guided_heads(model, None, 1, -1)), (weaker, guided_heads(weaker, None, 1, 2))):
        high, ours = guided_heads(model, None, 1, 2), guided_heads(model, guide, 3.0, 2)
        for a, b, c in zip(ours, high, low, strict=True):
            torch.testing.assert_close(a, c + 3 * (b - c))
        assert not torch.allclose(high.blurry, low.blurry)
        only_guide = guided_heads(model, guide, 0.0, 2)
        torch.testing.assert_close(only_guide.blurry, low.blurry)


def test_a_guide_that_saw_other_data_is_refused(tmp_path):
    model = with_classes(tmp_path, 0)
    path = tmp_path / "weak.safetensors"
    metadata = {"config": json.dumps(dump(model.config)), "data": json.dumps(model.info.to_json())}
    save_file(publish(model.network), path, metadata)
    options = SamplerConfig(guidance=2.0, guide=str(path))
    guide = load_guide(options, model.info)
    assert torch.equal(guide.network.flat, model.network.flat)
    assert load_guide(SamplerConfig(guide=str(path)), model.info) is None  # weight 1 needs none
    with pytest.raises(CheckpointError, match="made from data synthetic"):
        load_guide(options, replace(model.info, fingerprint="other"))


def test_network_is_drawn_from_the_seed(tmp_path):
    a, b = (build_network(config(tmp_path, train__seed=seed)).flat for seed in (0, 1))
    assert torch.equal(a, build_network(config(tmp_path)).flat)
    assert not torch.equal(a, b)


def test_labels_follow_the_data_s_shares(tmp_path, capsys):
    """Fault: classes are drawn evenly whatever the data's shares, or those that no image has."""
    model = with_classes(tmp_path, 0)
    counts = np.zeros(model.config.data.num_classes)
    counts[1], counts[-1] = 30, 10
    known = model._replace(info=replace(model.info, class_counts=counts))
    drawn = draw_labels(known, SamplerConfig(), 0, range(2000))
    assert set(drawn.tolist()) == {1, len(counts) - 1}
    assert abs((drawn == 1).mean() - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5
    np.testing.assert_array_equal(draw_labels(known, SamplerConfig(), 0, [7, 1999]), drawn[[7, 1999]])
    even = draw_labels(known, SamplerConfig(classes="even"), 0, range(2000))
    assert np.bincount(even, minlength=len(counts)).min() > 2000 / len(counts) / 2
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(draw_labels(model, SamplerConfig(), 0, range(2000)), even)
    assert "do not know the classes' shares" in capsys.readouterr().err


def test_labels_are_spread_and_reproducible():
    labels = sample_labels(0, range(1000), 10)
    assert np.bincount(labels, minlength=10).min() > 60  # 4 standard errors below 100
    np.testing.assert_array_equal(sample_labels(0, [5, 900], 10), labels[[5, 900]])
    assert (sample_labels(0, range(3), 0) == -1).all()


def test_a_non_finite_image_is_an_error(tmp_path):
    settings = config(tmp_path)
    network = build_network(settings)
    with torch.no_grad():
        weight(network, "conv_out.bias").fill_(float("nan"))
    model = Model(network, settings, info())
    with pytest.raises(NumericsError, match="numbers 0 to 1"):
        generate(model, range(2), np.full(2, -1), seed=0, device=CPU, batch_size=2, sampler=SAMPLER)
