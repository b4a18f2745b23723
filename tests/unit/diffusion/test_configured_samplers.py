"""A config's sampler and levels are the ones it names, with its own numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support.gaussian import gaussian_denoise
from tests.support.tiny_run import config
from warm_dist.config.bnr import PowerBNR
from warm_dist.config.run import SamplerConfig
from warm_dist.diffusion.process import ORIGIN, points, raised
from warm_dist.diffusion.samplers import (
    ancestral,
    churn,
    cold,
    edm_grid,
    first_order,
    heun,
    multistep,
    sampler_of,
    schedule,
)
from warm_dist.diffusion.spectrum import fallback_spectrum

CURVED = PowerBNR(kind="power", bnr=0.5, exponent=-0.3, cap=1.5)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"method": "churn", "s_churn": 9.0, "s_min": 0.1, "s_max": 20.0, "s_noise": 1.1},
         partial(churn, raise_to=partial(raised, CURVED), s_churn=9.0, s_min=0.1, s_max=20.0, s_noise=1.1)),
        ({"method": "ancestral", "eta": 0.6}, partial(ancestral, eta=0.6)),
        ({"method": "multistep"}, multistep),
        ({"method": "first_order"}, first_order),
        ({"method": "heun"}, heun),
        ({"method": "cold"}, cold),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_config_s_sampler_is_the_one_it_names_with_its_own_numbers(options, meant):
    path, x = points(CURVED, edm_grid(9, 0.002, 80.0, 7.0)), 80 * randn(1, 1, 4, 4)
    denoise, noise = gaussian_denoise(fallback_spectrum(4, 4)), lambda step: randn(1, 1, 4, 4, seed=step)
    ours = sampler_of(SamplerConfig(**options), CURVED)(denoise, x, path, noise)
    assert torch.equal(ours, meant(denoise, x, path, noise=noise))


def test_a_config_s_levels_are_those_it_names(tmp_path):
    """EDM's equation 5 in float64, and the path's BNR at each level."""
    options = {"num_steps": 3, "sigma_min": 0.01, "sigma_max": 10.0, "rho": 2.0, "bnr": 0.25}
    settings = config(tmp_path, process__bnr={"kind": "uniform", "low": 0, "high": 1}, sampler=options)
    _, found = schedule(settings, settings.sampler)
    middle = ((10**0.5 + 0.01**0.5) / 2) ** 2
    assert [point.sigma for point in found] == pytest.approx([10, middle, 0.01, 0])
    assert [point.alpha for point in found] == pytest.approx([2.5, middle / 4, 0.0025, 0])
    spaced = config(tmp_path, process__bnr=0.5, sampler={**options, "bnr": None, "grid": "log_linear"})
    assert schedule(spaced, spaced.sampler)[1][1] == pytest.approx((0.1**0.5, 0.1**0.5 / 2))
    frozen = config(tmp_path, process__bnr={"kind": "cold"}, sampler={"num_steps": 3, "grid": "log_linear"})
    assert schedule(frozen, frozen.sampler)[1] == [pytest.approx((0.02, alpha)) for alpha in (4, 0.4**0.5, 0.1)] + [
        ORIGIN
    ]  # half of 8 pixels
