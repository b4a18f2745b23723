"""At BNR 0 everything is EDM (arXiv 2206.00364), whose formulas are written out here and evaluated in float64."""

import math
from itertools import pairwise

import pytest
import torch

from warm_dist.config.bnr import ConstantBNR
from warm_dist.config.run import ProcessConfig
from warm_dist.diffusion.heads import heads, loss
from warm_dist.diffusion.process import Level, level_at, points, raised, training_level
from warm_dist.diffusion.samplers import churn, edm_grid, heun
from warm_dist.diffusion.spectrum import fallback_spectrum

DATA = 0.5
SPECTRUM = fallback_spectrum(8, 12, DATA)
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
WEIGHT = torch.randn(6, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3


def network(x, c_noise, c_blur):
    """A small nonlinear net that listens to the noise level; its second head must not matter."""
    assert not c_blur.any()
    h = torch.nn.functional.conv2d(x, WEIGHT.to(x.dtype), padding=1)
    return torch.tanh(h + c_noise[:, None, None, None])


def edm_denoise(x, sigma):
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise), EDM eq. 7 and table 1."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    c_skip, c_out = DATA**2 / (sigma**2 + DATA**2), sigma * DATA / (sigma**2 + DATA**2).sqrt()
    c_in, c_noise = 1 / (sigma**2 + DATA**2).sqrt(), sigma.log() / 4
    h = torch.nn.functional.conv2d(c_in * x, WEIGHT[:3], padding=1)
    return c_skip * x + c_out * torch.tanh(h + c_noise)


def close(ours, edm, dtype, rtol):
    assert ours.dtype == dtype
    assert float((ours.double() - edm).norm() / edm.norm()) < rtol


def images(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 12, dtype=torch.float64, generator=generator).to(dtype)


@DTYPES
def test_wrapper(dtype, rtol):
    """Fault: at BNR 0, a scale or the network's noise input is not EDM's, or float32 loses digits."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    x = images(dtype) * (sigma**2 + DATA**2).sqrt().to(dtype)[:, None, None, None]
    estimate = heads(network, SPECTRUM, x, Level(sigma, 0 * sigma))
    for k in range(4):
        close(estimate.blurry[k], edm_denoise(x.double(), sigma)[k], dtype, rtol)
    assert not estimate.residual.any()


@DTYPES
def test_loss(dtype, rtol):
    """Fault: at BNR 0, the weight or the training levels are not EDM's, or the residual head adds to the loss."""
    x0, noise, normal = DATA * images(dtype), images(dtype, 1), torch.tensor([-2.0, 0.0, 1.0, 2.5])
    level = training_level(ProcessConfig(bnr=0), normal, torch.rand(4), 12)
    sigma = torch.exp(normal.double() * 1.2 - 1.2)
    s, clean, epsilon = sigma[:, None, None, None], x0.double(), noise.double()
    edm = (s**2 + DATA**2) / (s * DATA) ** 2 * (edm_denoise(clean + s * epsilon, sigma) - clean) ** 2
    ours = loss(network, SPECTRUM, x0, level, noise, diagnose=True)
    for k in range(4):  # EDM's weight times a small difference would lose digits in float32; ours keeps them
        assert float(ours.total[k]) == pytest.approx(float(edm[k].mean()), rel=rtol)
    assert not ours.residual.any()
    assert ours.inconsistency is not None
    assert not ours.inconsistency.any()


def algorithm_2(x, sigmas, noise, s_churn, s_min, s_max, s_noise):
    """EDM, Algorithm 2; with S_churn 0 Algorithm 1."""
    n = len(sigmas) - 1
    for i, (t, s) in enumerate(pairwise(sigmas)):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * noise(i)
        d = (x_hat - edm_denoise(x_hat, torch.tensor([t_hat], dtype=torch.float64))) / t_hat
        x = x_hat + (s - t_hat) * d
        if s > 0:
            d_prime = (x - edm_denoise(x, torch.tensor([s], dtype=torch.float64))) / s
            x = x_hat + (s - t_hat) * (d + d_prime) / 2
    return x


@DTYPES
@pytest.mark.parametrize("s_churn", [0.0, 2.0, 40.0])
def test_sampler(dtype, rtol, s_churn):
    """Fault: at BNR 0, churn or Heun's second slope uses another noise level than EDM's Algorithm 2."""
    path = ConstantBNR(bnr=0)
    x, noise = 80 * images(dtype), lambda step: images(dtype, 100 + step)
    sigmas = [*edm_grid(12, 0.002, 80.0, 7.0), 0.0]

    def denoise(x, level):
        return heads(network, SPECTRUM, x, level)

    window = {"s_churn": s_churn, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    edm = algorithm_2(x.double(), sigmas, lambda step: noise(step).double(), **window)
    ours = churn(denoise, x, points(path, sigmas[:-1]), noise, lambda p, f: raised(path, p, f), **window)
    close(ours, edm, dtype, rtol)
    if s_churn == 0:
        assert torch.equal(ours, heun(denoise, x, points(path, sigmas[:-1])))
    assert level_at(points(path, [2.0])[0]).alpha == 0
