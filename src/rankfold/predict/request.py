"""``PredictRequest``: what is to be answered, and where the answers go."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rankfold.data.shapes.sources import Encoding, LeftOut, Source
from rankfold.models.answering.sampling import AT_ONCE, Sampling
from rankfold.predict.tables import WRITERS, suffix_of
from rankfold.settings import CheckedSettings

EngineName = Literal["own", "llama.cpp", "vllm"]


class PredictRequest(CheckedSettings):
    """Rows to answer and the file for the answers.  Build it with ``PredictRequest.of``."""

    data: str = Field(min_length=1, description="rows to answer: file, folder or hub data set")
    out: Path = Field(description=f"file for the answers: {' '.join(WRITERS)}")
    shape: str | None = Field(
        None, min_length=1, description="the shape of the rows, or prompt=COLUMN [detected]"
    )
    encoding: Encoding = Field(None, description="encoding of text files [UTF-8, or what their bytes tell]")
    leave_out: LeftOut = Field(
        [], description="columns, and kinds of parts of messages, to pass over, with commas between them"
    )
    images: str | None = Field(None, description="folder in which paths of images start [the rows' own]")
    system: str | None = Field(None, min_length=1, description="a system message for rows that have none")
    column: str = Field("prediction", min_length=1, description="column that the answers go to")
    samples: int = Field(1, ge=1, le=10_000, description="answers to each row")
    engine: EngineName = Field("own", description="who answers: own, llama.cpp or vllm")
    engine_python: Path | None = Field(
        None, description="the Python interpreter of the environment that has the engine [this one]"
    )
    at_once: int = Field(AT_ONCE, ge=1, le=4096, description="rows answered together, if memory allows")

    @field_validator("out")
    @classmethod
    def _is_known(cls, out: Path) -> Path:
        if suffix_of(out) not in WRITERS:
            raise ValueError(f"the name must end in one of {' '.join(WRITERS)}")
        return out

    @model_validator(mode="after")
    def _is_another_file(self) -> PredictRequest:
        if Path(self.data).expanduser().resolve() == self.out.expanduser().resolve():
            raise ValueError("out is the file of the rows; name another")
        return self

    @property
    def source(self) -> Source:
        return Source(self.data, images=self.images, encoding=self.encoding, leave_out=tuple(self.leave_out))


def sampling_of(given: dict[str, Any], samples: int) -> Sampling:
    """How answers are drawn: the likeliest, unless a temperature is given or each row is to have several."""
    settled = Sampling.of(given)
    if "temperature" in given or samples > 1 or settled.generation_config:
        return settled
    return settled.model_copy(update={"temperature": 0.0})
