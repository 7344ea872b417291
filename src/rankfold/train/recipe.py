"""``Recipe``: the one source of a run's settings, for Python, flags and help alike."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rankfold.data.sources import Source
from rankfold.models.find import DEFAULT_MODEL
from rankfold.settings import CheckedSettings


class Recipe(CheckedSettings):
    """What to train on what.  A setting left at None is chosen from the data and the model, with the
    reason printed.  Build it with ``Recipe.of`` to get rankfold's errors instead of pydantic's."""

    model: str = Field(DEFAULT_MODEL, min_length=1, description="model folder, .gguf file or hub id")
    data: str | Path | list[Source] = Field(
        description="rows to train on: a file or folder, a hub data set, or several with weights (a:2,b:1)"
    )
    shape: str | None = Field(
        None, description="what the rows are: a shape, or prompt=COLUMN,completion=COLUMN [detected]"
    )
    skip_bad: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="share of bad rows to leave out and count"
    )
    out: Path = Field(description="folder for the adapter and the report; must not exist")
    held_out: str | Path | list[Source] | None = Field(
        None, description="rows to judge on [5 % of the data, at most 200 rows]"
    )
    targets: str = Field("all-linear", min_length=1, description="modules to adapt: all-linear or a pattern")
    rank: int | None = Field(None, ge=1, le=4096, description="rank of the update [16; 32 above 10,000 rows]")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="scale = alpha / rank [2 x rank]"
    )
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="dropout before lora_A")
    learning_rate: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="peak learning rate [by model size and steps]"
    )
    epochs: int | None = Field(None, ge=1, le=1000, description="passes over the data [by steps, at most 3]")
    rows_per_step: int | None = Field(
        None, ge=1, le=4096, description="rows an optimiser step sees [8 or 16]"
    )
    batching: Literal["packed", "padded"] | None = Field(
        None, description="packed: rows one after another; padded: side by side [what takes less arithmetic]"
    )
    max_length: int = Field(
        1024, ge=8, description="longest row in tokens; longer ones are left out and named"
    )
    samples: int = Field(3, ge=0, le=20, description="held-out prompts answered before and after")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the adapter's start and of the row order")
