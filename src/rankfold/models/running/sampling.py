"""How an answer is drawn."""

from __future__ import annotations

from pydantic import Field

from rankfold.settings import CheckedSettings


class Sampling(CheckedSettings):
    """How an answer is drawn, for Python and flags alike."""

    max_new_tokens: int = Field(128, ge=1, le=100_000, description="longest answer in tokens")
    temperature: float = Field(
        0.7, ge=0, le=10, allow_inf_nan=False, description="0 always takes the likeliest token"
    )
    top_p: float = Field(0.9, gt=0, le=1, allow_inf_nan=False, description="share of likelihood to draw from")
    seed: int = Field(0, ge=0, lt=2**63, description="one seed, one answer")
