"""``ExportRequest``: what is to become of an adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rankfold.models.choices import PrecisionName
from rankfold.settings import CheckedSettings

Format = Literal["merged"]


class ExportRequest(CheckedSettings):
    """How an adapter is written, and what its certificate is made from."""

    to: Format = Field(
        description="merged: a plain model, in the files that transformers and the engines read"
    )
    model: str | None = Field(None, description="base model: folder, .gguf file or hub id [the adapter's]")
    dtype: PrecisionName | None = Field(
        None,
        description="number format that is written: float32, bfloat16 or float16 [that of the base's files; "
        "bfloat16 for a GGUF file]",
    )
    data: str | None = Field(
        None, description="rows whose prompts the certificate asks [those that the run held out]"
    )
    prompts: int = Field(
        16, ge=0, le=1000, description="prompts that the certificate asks; 0 for no certificate"
    )
    shard_mb: int = Field(1000, ge=1, description="size of a file of weights, in 10^6 bytes")
    allow: list[str] = Field(
        [],
        description="write it in spite of a fault, which is then told: missing, unexpected, shape, "
        "non_finite, base, hash, config or option; may be given several times",
    )
