"""What may be said of a base, in the words of settings: their types alone, which cost no time to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rankfold.settings import CheckedSettings, split_at_commas

PrecisionName = Literal["float32", "bfloat16", "float16"]
Stored = Literal["bfloat16", "int8", "q4_0", "gguf", "nf4"]
Part = Literal["language", "projector", "vision"]
PartNames = Annotated[list[Part], BeforeValidator(split_at_commas)]  # a list, or words and commas
PromptStyle = Literal["chat", "plain"]  # of rows: conversations, or running text


class ModelRequest(CheckedSettings):
    """A model to be asked: a base, perhaps with an adapter, and how its weights are held."""

    adapter: Path | None = Field(None, description="adapter folder, such as a run's output folder")
    model: str | None = Field(None, description="base model: folder, .gguf file or hub id [the adapter's]")
    precision: PrecisionName | None = Field(
        None,
        description="number format of the base: float32, bfloat16 or float16 [float32, bfloat16 on a GPU]",
    )
    stored: Stored | None = Field(
        None,
        description="hold the base's weights as gguf (a GGUF file's own blocks), q4_0, int8, bfloat16 or nf4",
    )
    allow: list[str] = Field(
        [],
        description="load an adapter in spite of a fault, which is then told: missing, unexpected, shape, "
        "non_finite, base, hash, config or option; may be given several times",
    )
    eos_token: str = Field("", description="what ends a text, where the model's files name no token")

    @property
    def is_rounded(self) -> bool:
        """Whether the base is held in fewer bytes than float32's, where an adapter merged into it would be
        rounded too."""
        return self.stored is not None or self.precision not in (None, "float32")
