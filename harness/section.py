"""What all sections of a configuration have in common.

Every section is frozen, refuses unknown keys, and is strict about types: a count is a whole number,
not a fraction or a boolean; no number is infinite or NaN.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        validate_default=False,
    )


Count = Annotated[int, Field(ge=1, le=2**53)]
