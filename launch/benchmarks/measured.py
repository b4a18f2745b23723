"""What `bench.py gpu --json` printed, as far as the model of a step believes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from launch.benchmarks.contenders import ENGINES, parts_of
from warm_dist.config.load import read_tree, validate_as
from warm_dist.config.values import Fraction, Positive, PositiveFloat
from warm_dist.errors import ConfigError


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("needs printable characters alone")  # a terminal obeys others
    return text


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+-(fp32|bf16)(-compiled)?$")]


class Part(BaseModel):
    """Base of a report's parts: strict and frozen; other keys than these are left alone."""

    model_config = ConfigDict(frozen=True, strict=True)


class Figures(Part):
    """Median, minimum and maximum over rounds."""

    median: PositiveFloat
    min: PositiveFloat
    max: PositiveFloat

    def model_post_init(self, context: Any) -> None:
        if not self.min <= self.median <= self.max:
            raise ValueError(f"median {self.median:g} is not between min {self.min:g} and max {self.max:g}")


class Row(Part):
    """One contender's figures, see `gpu.row`."""

    images_per_s: Figures
    seconds: Figures
    mfu: Annotated[float, Field(gt=0, le=1)] | None
    wait_share: Fraction | None

    def model_post_init(self, context: Any) -> None:
        if self.mfu is not None and self.mfu > 1 - (self.wait_share or 0):
            raise ValueError(
                f"mfu {self.mfu:g} in the time that wait_share {self.wait_share:g} leaves is above the peak"
            )


class Measured(Part):
    """A report, see `gpu.report`."""

    device: Text
    config: Text
    images: Positive
    micro_batches: Positive
    rows: dict[Name, Row]

    def model_post_init(self, context: Any) -> None:
        if not self.steps:
            raise ValueError(
                "rows has no training step with an MFU, as a GPU gives it, with --set parallel.peak_flops=N where the "
                "GPU's peak is unknown"
            )

    @property
    def steps(self) -> list[str]:
        """The names of training steps with an MFU."""
        return [name for name, row in self.rows.items() if parts_of(name)[0] in ENGINES and row.mfu is not None]


def read_measured(path: Path) -> Measured:
    """Read a report. Raises ConfigError, which names the file and the first field that cannot be true."""
    try:
        return validate_as(Measured, read_tree(path), f"--measured {path}")
    except ConfigError as error:
        raise ConfigError(f"{str(error).splitlines()[0]} (it takes what launch/bench.py gpu --json prints)") from None
