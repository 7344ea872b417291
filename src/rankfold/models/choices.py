"""What may be said of a base, in the words of settings: their types alone, which cost no time to import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from rankfold.settings import split_at_commas

PrecisionName = Literal["float32", "bfloat16", "float16"]
Stored = Literal["bfloat16", "int8", "q4_0", "gguf", "nf4"]
Part = Literal["language", "projector", "vision"]
PartNames = Annotated[list[Part], BeforeValidator(split_at_commas)]  # a list, or words and commas
PromptStyle = Literal["chat", "plain"]  # of rows: conversations, or running text
