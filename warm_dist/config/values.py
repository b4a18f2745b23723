"""Building blocks of config sections: the strict base class and bounded numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _squarable(value: float) -> float:
    if value and not 1e-15 <= abs(value) <= 1e15:
        raise ValueError("needs a size from 1e-15 to 1e15, whose square float32 can hold")
    return value or 0.0  # not -0.0, which messages would show


def whole(value: Any) -> Any:
    """The value, if it is an integer and not a boolean or float that equals one. Raises ValueError."""
    if type(value) is not int:
        raise ValueError("needs a whole number")
    return value


def model_name(text: str) -> str:
    """The text, if it can name a registered model in MLflow. Raises ValueError."""
    if not text.strip() or {"/", ":"} & set(text):
        raise ValueError("needs a name without / and :")
    return text


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_squarable)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_squarable)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_squarable)]
Positive = Annotated[int, Field(gt=0, le=2**53)]  # what a float64 counts exactly
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(gt=0, le=2**16)]  # of what a network is built of
Name = Annotated[str, AfterValidator(model_name)]  # of a registered model
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all config sections: frozen; unknown, missing and mistyped keys are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def exact(value: float) -> str:
    """The shortest usual text that parses back to the same number: `0.5`, `0.12345671`."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
