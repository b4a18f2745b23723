"""The blur-to-noise ratio BNR = α/σ: constant, a path over σ, random in training, or cold. Each is a config value.

α is the standard deviation of the blur in pixels, σ that of the noise in data units.
Source: BNR, Warm Diffusion (arXiv 2511.16904); paths and random BNR are derived, docs/mathematics.md, section 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Discriminator, Field, Tag

from warm_dist.config.values import NonNegative, PositiveFloat, Section, exact

if TYPE_CHECKING:
    from torch import Tensor


class Path(Protocol):
    """A curve in the (α, σ) plane, α non-decreasing in σ and 0 at σ = 0."""

    def alpha(self, sigma: Tensor) -> Tensor:
        """α, pixels, at each σ; any shape, float64."""


class ConstantBNR(Section):
    """α = BNR·σ, the scale-invariant path; 0 is hot diffusion, EDM. Written in a config as the number alone."""

    bnr: NonNegative

    def alpha(self, sigma: Tensor) -> Tensor:
        return self.bnr * sigma


class PowerBNR(Section):
    """BNR(σ) = min(bnr·(σ/sigma_ref)^exponent, cap)."""

    kind: Literal["power"]
    bnr: NonNegative = Field(description="ratio at sigma_ref")
    exponent: Annotated[float, Field(gt=-1, le=10)] = Field(description="above -1: alpha must rise")
    sigma_ref: PositiveFloat = 1.0
    cap: PositiveFloat | None = Field(None, description="the largest ratio at any sigma")

    def alpha(self, sigma: Tensor) -> Tensor:
        # never as ratio · σ, which is ∞ · 0 at σ = 0 when the exponent is negative
        alpha: Tensor = self.bnr * self.sigma_ref**-self.exponent * sigma ** (1 + self.exponent)
        return alpha if self.cap is None else alpha.minimum(self.cap * sigma)


class TableBNR(Section):
    """α linear in σ between the points (σ_i, bnr_i·σ_i), constant BNR below the first and above the last."""

    kind: Literal["table"]
    sigma: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(description="rising")
    bnr: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = Field(description="the ratio at each sigma")

    def model_post_init(self, context: Any) -> None:
        if len(self.sigma) != len(self.bnr):
            raise ValueError(f"a table needs as many bnr ({len(self.bnr)}) as sigma ({len(self.sigma)})")
        rows = list(zip(self.sigma, self.bnr, strict=True))
        for (low, r_low), (high, r_high) in pairwise(rows):
            if high <= low:
                raise ValueError(f"a table's sigma must rise, {high:g} follows {low:g}")
            if r_high * high < r_low * low:
                raise ValueError(
                    f"alpha = bnr·sigma must not fall as sigma rises: it is {r_low * low:g} px at sigma {low:g}, "
                    f"{r_high * high:g} px at sigma {high:g}"
                )

    def alpha(self, sigma: Tensor) -> Tensor:
        knots, ratios = sigma.new_tensor([0.0, *self.sigma]), sigma.new_tensor([self.bnr[0], *self.bnr])
        values = knots * ratios
        k = (sigma[..., None] >= knots).sum(-1).clamp(1, len(knots) - 1)
        share = (sigma - knots[k - 1]) / (knots[k] - knots[k - 1])
        return (ratios[-1] * sigma).where(sigma > knots[-1], values[k - 1].lerp(values[k], share))


class UniformBNR(Section):
    """Each training image draws its BNR uniformly, so one network serves every path in between."""

    kind: Literal["uniform"]
    low: NonNegative
    high: PositiveFloat

    def model_post_init(self, context: Any) -> None:
        _check_range(self.low, self.high)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniforms in [0, 1) → BNR, same shape."""
        return self.low + (self.high - self.low) * uniform


class LogUniformBNR(Section):
    """Each training image draws ln BNR uniformly."""

    kind: Literal["log_uniform"]
    low: PositiveFloat
    high: PositiveFloat

    def model_post_init(self, context: Any) -> None:
        _check_range(self.low, self.high)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniforms in [0, 1) → BNR, same shape."""
        return self.low * (self.high / self.low) ** uniform


class Cold(Section):
    """BNR → ∞: σ at a small floor, α from alpha_max down to alpha_min, then 0. In training ln α is uniform."""

    kind: Literal["cold"]
    sigma: PositiveFloat = Field(0.02, description="the noise floor, never 0 while alpha > 0")
    alpha_min: PositiveFloat = Field(0.1, description="pixels")
    alpha_max: PositiveFloat | None = Field(None, description="pixels; null: half the image's width")

    def model_post_init(self, context: Any) -> None:
        if self.alpha_max is not None:
            _check_range(self.alpha_min, self.alpha_max)

    def highest(self, width: int) -> float:
        """The first level's α, pixels, where only the lowest 4×4 DCT modes exceed the noise floor."""
        return width / 2 if self.alpha_max is None else self.alpha_max

    def draw(self, uniform: Tensor, width: int) -> Tensor:
        """Uniforms in [0, 1) → α, same shape."""
        return self.alpha_min * (self.highest(width) / self.alpha_min) ** uniform


def _check_range(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"the low end {low:g} must be below the high end {high:g}")


def _kind(value: Any) -> str:
    return str(value.get("kind")) if isinstance(value, dict) else getattr(value, "kind", "number")


Number = Annotated[NonNegative, Tag("number")]
Power = Annotated[PowerBNR, Tag("power")]
Table = Annotated[TableBNR, Tag("table")]
Uniform = Annotated[UniformBNR, Tag("uniform")]
LogUniform = Annotated[LogUniformBNR, Tag("log_uniform")]
PathBNR = Annotated[Number | Power | Table, Discriminator(_kind)]
AnyBNR = Annotated[Number | Power | Table | Uniform | LogUniform | Annotated[Cold, Tag("cold")], Discriminator(_kind)]


def as_path(value: float | PowerBNR | TableBNR) -> Path:
    """The path that a config's number or section describes."""
    return value if isinstance(value, PowerBNR | TableBNR) else ConstantBNR(bnr=value)


def describe(value: float | Section | None) -> str:
    """A config's BNR as text for logs and fingerprints: `0.5`, `power(bnr 0.5, exponent 0.2, …)`."""
    if not isinstance(value, Section):
        return "none" if value is None else exact(value)
    parts = [f"{key} {item}" for key, item in value.model_dump().items() if key != "kind" and item is not None]
    return f"{getattr(value, 'kind', 'constant')}({', '.join(parts)})"
