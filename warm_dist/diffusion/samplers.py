"""Samplers: plain functions that integrate x along a path from its first point to its last.

Each takes `denoise(x, level) -> Heads`, the float64 state x (B, C, H, W) and decreasing points. They may end in (0, 0),
to which the step is first order (A(0) = I). The NFE counts calls of `denoise`. Stochastic samplers also take `noise`,
which returns the standard normals (B, C, H, W) of step k. Source: docs/mathematics.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from warm_dist.config.bnr import Cold, Path, as_path
from warm_dist.config.run import Config, SamplerConfig
from warm_dist.data import LOW_MODES, DataInfo
from warm_dist.diffusion.heads import Heads
from warm_dist.diffusion.process import Level, Point, cold_points, level_at, points, raised, transition
from warm_dist.diffusion.spectrum import blur, dct, eigenvalues, idct, unblurred
from warm_dist.errors import ConfigError, DataError

Denoise = Callable[[Tensor, Level], Heads]
Noise = Callable[[int], Tensor]
Sampler = Callable[[Denoise, Tensor, Sequence[Point], Noise], Tensor]


def edm_grid(num_steps: int, low: float, high: float, rho: float) -> list[float]:
    """σ_i = (σ_max^{1/ρ} + i/(N−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, i < N, without the final 0. Source: EDM, eq. 5."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + i / (num_steps - 1) * (last - first)) ** rho for i in range(num_steps)]


def log_linear_grid(num_steps: int, low: float, high: float) -> list[float]:
    """N levels from high to low with a constant ratio, without the final 0."""
    return [high * (low / high) ** (i / (num_steps - 1)) for i in range(num_steps)]


def schedule(config: Config, options: SamplerConfig) -> tuple[Path | Cold, list[Point]]:
    """The path to sample a network of `config` along, and its points from the noisiest to (0, 0).

    Raises ConfigError where the settings do not give falling levels and a blur whose square is a number.
    """
    try:
        path, found = _schedule(config, options)
        levels = [point.alpha if isinstance(path, Cold) else point.sigma for point in found]
        fits = all(high > low for high, low in pairwise(levels)) and all(math.isfinite(p.alpha**2) for p in found)
    except ArithmeticError:
        fits = False
    if not fits:
        raise ConfigError(
            f"sampler: {options.num_steps} levels from {options.sigma_max:g} to {options.sigma_min:g} (grid, rho "
            f"{options.rho:g}) and their blur must be distinct finite numbers"
        )
    return path, found


def _schedule(config: Config, options: SamplerConfig) -> tuple[Path | Cold, list[Point]]:
    trained = config.process.bnr
    cold = trained if isinstance(trained, Cold) else None
    low, high = options.sigma_min, options.sigma_max
    if cold:
        low, high = cold.alpha_min, cold.highest(config.data.resolution)
    if options.grid == "edm":
        grid = edm_grid(options.num_steps, low, high, options.rho)
    elif options.grid == "log_linear":
        grid = log_linear_grid(options.num_steps, low, high)
    else:
        grid = [float(value) for value in options.grid]
    if cold:
        return cold, cold_points(cold, grid)
    path = as_path(trained if options.bnr is None else options.bnr)  # type: ignore[arg-type]  # check_sampling
    return path, points(path, grid)


def sharpen(x: Tensor, alpha_now: float, alpha_next: float) -> Tensor:
    """(A(α_next) − A(α_now)) x for α_next <= α_now, without cancellation or division by A; shape and dtype of x."""
    drop = max(alpha_now**2 - alpha_next**2, 0.0) ** 0.5
    removed, after = (torch.full((1,), a, dtype=torch.float64, device=x.device) for a in (drop, alpha_next))
    return blur(unblurred(x, removed), after)


def first_order(denoise: Denoise, x: Tensor, path: Sequence[Point], noise: Noise | None = None) -> Tensor:
    """x_s = x + (s − t)(x − b̂)/t + (A_s − A_t)(b̂ + R̂): an EDM Euler step plus Cold Diffusion's Algorithm 2."""
    for t, s in pairwise(path):
        now = denoise(x, level_at(t, x.device))
        x = x + (s.sigma - t.sigma) * (x - now.blurry) / t.sigma + sharpen(now.clean, t.alpha, s.alpha)
    return x


def heun_step(denoise: Denoise, x: Tensor, t: Point, s: Point) -> Tensor:
    """One Heun step: first order, then with the mean of both ends' slopes in σ and in A; first order to σ = 0."""
    now = denoise(x, level_at(t, x.device))
    slope = (x - now.blurry) / t.sigma
    euler = x + (s.sigma - t.sigma) * slope + sharpen(now.clean, t.alpha, s.alpha)
    if s.sigma == 0:
        return euler
    then = denoise(euler, level_at(s, x.device))
    slope = (slope + (euler - then.blurry) / s.sigma) / 2
    return x + (s.sigma - t.sigma) * slope + sharpen((now.clean + then.clean) / 2, t.alpha, s.alpha)


def heun(denoise: Denoise, x: Tensor, path: Sequence[Point], noise: Noise | None = None) -> Tensor:
    """Heun's method: second order, two evaluations a step, one in the step to σ = 0. At BNR 0, EDM's Algorithm 1."""
    for t, s in pairwise(path):
        x = heun_step(denoise, x, t, s)
    return x


def churn(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Point],
    noise: Noise,
    raise_to: Callable[[Point, float], Point],
    s_churn: float,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun with churn: before each step, noise up to t̂ = t (1 + γ), γ = min(S_churn/N, √2 − 1) if S_min <= σ <= S_max.

    The step up is the forward transition (blur and noise), which keeps the marginal exactly. raise_to: (point, factor)
    → the path's point at the level times factor. At BNR 0 this is EDM's Algorithm 2.
    """
    gamma = min(s_churn / (len(path) - 1), math.sqrt(2) - 1)
    for step, (t, s) in enumerate(pairwise(path)):
        if gamma > 0 and s_min <= t.sigma <= s_max:
            up = raise_to(t, 1 + gamma)
            x = transition(x, level_at(t, x.device), level_at(up, x.device), s_noise * noise(step))
            t = up
        x = heun_step(denoise, x, t, s)
    return x


def multistep(denoise: Denoise, x: Tensor, path: Sequence[Point], noise: Noise | None = None) -> Tensor:
    """2M: the semilinear form d(u/σ) = x̂0 d(a/σ), x̂0 extrapolated from the last step: second order, NFE 1 a step.

    u_s = (s/t) u + (a_s − (s/t) a_t) D, D = (1 + 1/(2ρ)) x̂0 − x̂0_prev/(2ρ), ρ = h_prev/h, h = ln(t/s), on the cold
    path ln(α_t/α_s); D = x̂0 in the first step and in the step to 0. Source: as DPM-Solver++(2M), arXiv 2211.01095.
    """
    before, h_before = None, 0.0
    for t, s in pairwise(path):
        clean = estimate = denoise(x, level_at(t, x.device)).clean
        h = _log_ratio(t, s)
        if before is not None and math.isfinite(h):
            half = h / (2 * h_before)
            estimate = (1 + half) * clean - half * before
        ratio = s.sigma / t.sigma
        # (a_s − r a_t) D = (a_s − a_t) D + (1 − r) a_t D: the first part without cancellation, the second 0 if cold
        blurry = blur(estimate, level_at(t, x.device).alpha)
        x = ratio * x + sharpen(estimate, t.alpha, s.alpha) + (1 - ratio) * blurry
        before, h_before = clean, h
    return x


def _log_ratio(t: Point, s: Point) -> float:
    high, low = (t.sigma, s.sigma) if s.sigma != t.sigma else (t.alpha, s.alpha)
    return math.log(high / low) if low > 0 else math.inf


def ancestral(denoise: Denoise, x: Tensor, path: Sequence[Point], noise: Noise, eta: float) -> Tensor:
    """The η family, per mode u_s = a_s x̂0 + sqrt(s² − ς²)(u − a_t x̂0)/t + ς ε.

    ς² = η² s² (t² − k² s²)/t², k = exp(−λ(α_t² − α_s²)/2). η = 0 is DDIM, η = 1 the posterior of Blurring Diffusion
    (arXiv 2209.05557). s² − ς² is written without cancellation.
    """
    lam = eigenvalues(x.shape[-2], x.shape[-1], x.device)
    for step, (t, s) in enumerate(pairwise(path)):
        clean = dct(denoise(x, level_at(t, x.device)).clean)
        k2 = torch.exp(-lam * (t.alpha**2 - s.alpha**2))
        kept = s.sigma**2 * (1 - eta**2) + eta**2 * k2 * s.sigma**4 / t.sigma**2
        fresh = eta * s.sigma * (t.sigma**2 - k2 * s.sigma**2).clamp_min(0).sqrt() / t.sigma  # clamp: rounding at s = t
        a_t, a_s = (torch.exp(-lam * point.alpha**2 / 2) for point in (t, s))
        u = a_s * clean + kept.sqrt() * (dct(x) - a_t * clean) / t.sigma
        x = idct(u + fresh * dct(noise(step)) if eta > 0 and s.sigma > 0 else u)
    return x


def cold(denoise: Denoise, x: Tensor, path: Sequence[Point], noise: Noise | None = None) -> Tensor:
    """x_s = x − A_t x̂0 + A_s x̂0: only deblurs. Source: Cold Diffusion (arXiv 2208.09392), Algorithm 2."""
    for t, s in pairwise(path):
        x = x + sharpen(denoise(x, level_at(t, x.device)).clean, t.alpha, s.alpha)
    return x


def sampler_of(options: SamplerConfig, path: Path | Cold) -> Sampler:
    """The sampler named by `options.method`, its parameters bound."""
    plain: dict[str, Sampler] = {"heun": heun, "first_order": first_order, "multistep": multistep, "cold": cold}
    if options.method == "churn":
        return partial(churn, raise_to=partial(raised, path), s_churn=options.s_churn, s_min=options.s_min,
                       s_max=options.s_max, s_noise=options.s_noise)  # fmt: skip
    return partial(ancestral, eta=options.eta) if options.method == "ancestral" else plain[options.method]


def nfe(method: str, num_steps: int) -> int:
    """Number of calls of `denoise` in `num_steps` steps down to (0, 0). With guidance each call runs two networks."""
    return 2 * num_steps - 1 if method in ("heun", "churn") else num_steps


def num_steps_for(method: str, evaluations: int) -> int | None:
    """The number of steps with exactly this NFE, or None (Heun's NFE is odd)."""
    num_steps = (evaluations + 1) // 2 if method in ("heun", "churn") else evaluations
    return num_steps if nfe(method, num_steps) == evaluations and num_steps >= 2 else None


def start(noise: Tensor, point: Point, info: DataInfo | None) -> Tensor:
    """The state at the first point, (B, C, H, W) float64, from standard normals of that shape.

    info None: σ·noise, as in the paper and EDM. Otherwise u ~ N(a m_k, a² Var_k + σ²) per mode, with the data's
    measured mean and spectrum, channel means subtracted. Source: derived.
    """
    if info is None:
        return point.sigma * noise
    a = torch.exp(-eigenvalues(*noise.shape[-2:], device=noise.device) * point.alpha**2 / 2)
    centred = torch.tensor(info.mean_image - info.channel_mean[:, None, None]).to(noise)
    mean = dct(centred)
    spectrum = torch.tensor(info.power_spectrum).to(noise)
    variance = (spectrum - mean.square().mean(0)).clamp_min(0)
    return idct(a * mean + (a.square() * variance + point.sigma**2).sqrt() * dct(noise))


def cold_start(noise: Tensor, normals: Tensor, point: Point, info: DataInfo) -> Tensor:
    """The cold path's start: A(α) of a Gaussian over the lowest 4 x 4 DCT modes of all channels, plus σ·noise.

    noise: (B, C, H, W); normals: (B, K), K = len(info.low_mean): standard normals, float64. Raises DataError if the
    manifest lacks these modes' mean and covariance. Source: Cold Diffusion, section 5; modes derived.
    """
    rows, columns = (min(LOW_MODES, size) for size in noise.shape[-2:])
    if len(info.low_mean) != noise.shape[1] * rows * columns:
        raise DataError("the manifest has no statistics of the lowest DCT modes; pack or index the data again")
    values, vectors = torch.linalg.eigh(torch.tensor(info.low_covariance, device=noise.device))
    root = vectors * values.clamp_min(0).sqrt()  # a singular covariance (few images) has no Cholesky factor
    low = torch.tensor(info.low_mean, device=noise.device) + normals @ root.mT
    u = torch.zeros_like(noise)
    u[..., :rows, :columns] = low.reshape(len(noise), -1, rows, columns)
    a = torch.exp(-eigenvalues(*noise.shape[-2:], device=noise.device) * point.alpha**2 / 2)
    return idct(a * u) + point.sigma * noise


def guided(denoise: Denoise, guide: Denoise, weight: float) -> Denoise:
    """Guidance: extrapolate both heads, b̂ = b̂_guide + w (b̂ − b̂_guide) and R̂ alike; two network evaluations a call.

    guide: the same network without class labels (classifier-free guidance) or a weaker one (autoguidance). w = 1 is
    `denoise` alone, w = 0 the guide alone. Linear in the heads, so x̂0 and the score are guided in the same way.
    """

    def combined(x: Tensor, level: Level) -> Heads:
        strong, weak = denoise(x, level), guide(x, level)
        return Heads(*(low + weight * (high - low) for high, low in zip(strong, weak, strict=True)))

    return combined
