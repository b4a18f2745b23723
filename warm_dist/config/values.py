"""What every section of a config is made of: strict sections and ranges of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One object of the config: unknown, missing and mistyped keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def exact(value: float) -> str:
    """Short, and never the text of another number: `0.5`, `0.12345671`."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


UNION_TAGS = {"constrained-float", "literal['measured']", "grid name", "grid list",
              "number", "power", "table", "uniform", "log_uniform", "cold"}  # fmt: skip
"""What the location of a validation error names besides keys: the branches of unions."""
