from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.worker import config, info
from warm_dist.config import SamplerConfig
from warm_dist.errors import NumericsError
from warm_dist.generate import build_network, centre, generate, sample_labels, to_uint8

CPU = torch.device("cpu")
SAMPLER = SamplerConfig(num_steps=4)


def images(tmp_path: Path, indices, batch_size: int, seed: int = 0) -> np.ndarray:
    settings = config(tmp_path)
    network = build_network(settings)
    labels = np.full(len(indices), -1)
    return generate(
        network, settings, info(), indices, labels, seed=seed, device=CPU, batch_size=batch_size, sampler=SAMPLER
    )


def test_centre_and_back():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    mean = torch.tensor([0.3], dtype=torch.float64)
    assert torch.equal(to_uint8(centre(x, mean).double(), mean), x)
    assert float(to_uint8(torch.full((1, 1, 1, 1), 9.0), mean)) == 255


def test_an_image_is_its_seed_and_number(tmp_path):
    whole = images(tmp_path, range(6), batch_size=4).astype(int)
    part = images(tmp_path, [4, 1], batch_size=2).astype(int)
    assert np.abs(part - whole[[4, 1]]).max() <= 1  # another batch size may round the last bit
    assert np.abs(images(tmp_path, range(6), 4, seed=1).astype(int) - whole).max() > 10


def test_network_is_drawn_from_the_seed(tmp_path):
    a, b = (build_network(config(tmp_path, train__seed=seed)).conv_out.weight for seed in (0, 1))
    assert torch.equal(a, build_network(config(tmp_path)).conv_out.weight)
    assert not torch.equal(a, b)


def test_labels_are_spread_and_reproducible():
    labels = sample_labels(0, range(1000), 10)
    assert np.bincount(labels, minlength=10).min() > 60  # 4 standard errors below 100
    np.testing.assert_array_equal(sample_labels(0, [5, 900], 10), labels[[5, 900]])
    assert (sample_labels(0, range(3), 0) == -1).all()


def test_a_non_finite_image_is_an_error(tmp_path):
    settings = config(tmp_path)
    network = build_network(settings)
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="numbers 0 to 1"):
        generate(network, settings, info(), range(2), np.full(2, -1), seed=0, device=CPU, batch_size=2, sampler=SAMPLER)
