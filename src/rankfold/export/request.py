"""``ExportRequest``: what is to become of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rankfold.models.choices import PrecisionName
from rankfold.settings import CheckedSettings

Format = Literal[
    "merged",
    "gguf",
    "gguf-adapter",
    "ollama",
    "ollama-adapter",
    "hf",
    "internvl",
    "mlx",
    "vllm",
    "sglang",
    "lmdeploy",
    "hub",
]
GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
ADAPTERS = ("gguf-adapter", "ollama-adapter")
# Options that say something of some formats only.
ONLY_FOR = {
    "dtype": ("merged",),
    "shard_mb": ("merged",),
    "type": ("gguf", "ollama"),
    "gguf_base": ADAPTERS,
    "engine_python": ("gguf", "ollama", "mlx", *ADAPTERS),
    "common_rank": ("internvl",),
    "public": ("hub",),
    "yes": ("hub",),
}


class ExportRequest(CheckedSettings):
    """How an adapter is written, and what its certificate is made from."""

    to: Format = Field(
        description="merged: a plain model, in the files that transformers and the engines read; gguf: a "
        "plain model in one file, for llama.cpp; gguf-adapter: the adapter alone, for llama.cpp; ollama, "
        "ollama-adapter: the same with a Modelfile; hf, internvl, mlx: the adapter under transformers', the "
        "original InternVL's or mlx-lm's names; vllm, sglang, lmdeploy: the adapter as that server takes it; "
        "hub: sends a folder that was exported to --out OWNER/NAME, after showing what would be sent"
    )
    model: str | None = Field(None, description="base model: folder, .gguf file or hub id [the adapter's]")
    dtype: PrecisionName | None = Field(
        None,
        description="to merged: number format that is written: float32, bfloat16 or float16 [that of the "
        "base's files; bfloat16 for a GGUF file]",
    )
    type: GgufType | None = Field(
        None,
        description="to gguf and ollama: what matrices are written in: F32, F16, BF16, Q8_0, Q5_1, Q5_0, "
        "Q4_1 or Q4_0 [as in the base's files]",
    )
    gguf_base: Path | None = Field(
        None,
        description="to gguf-adapter and ollama-adapter: the base as a GGUF file, with which the adapter is "
        "tried [the base, if it is one]",
    )
    common_rank: int | None = Field(
        None,
        ge=1,
        description="to internvl: one rank for all modules, higher ones brought down to it by SVD [exact]",
    )
    engine_python: Path | None = Field(
        None,
        description="the Python interpreter of the environment that has the engine, which then reads what "
        "was written: llama-cpp-python or mlx-lm [this one]",
    )
    data: str | None = Field(
        None, description="rows whose prompts the certificate asks [those that the run held out]"
    )
    prompts: int = Field(
        16, ge=0, le=1000, description="prompts that the certificate asks; 0 for no certificate"
    )
    public: bool = Field(False, description="to hub: let everybody see it [only you]")
    yes: bool = Field(False, description="to hub: send it without asking")
    shard_mb: int = Field(500, ge=1, description="to merged: size of a file of weights, in 10^6 bytes")
    allow: list[str] = Field(
        [],
        description="write it in spite of a fault, which is then told: missing, unexpected, shape, "
        "non_finite, base, hash, config or option; may be given several times",
    )

    @model_validator(mode="after")
    def _fits(self) -> Any:
        wrong = [
            f"{name} is for {', '.join(formats)}, and this is {self.to}"
            for name, formats in ONLY_FOR.items()
            if name in self.model_fields_set and getattr(self, name) is not None and self.to not in formats
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self
