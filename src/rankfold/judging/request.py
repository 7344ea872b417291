"""``EvalRequest``: the rows to judge models on, and what they are measured by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rankfold.data.shapes.sources import Encoding, LeftOut
from rankfold.data.tokens.mask import TrainOn
from rankfold.errors import nearest
from rankfold.judging.metrics import FUNCTION, NAMES, PATTERN
from rankfold.models.answering.sampling import AT_ONCE
from rankfold.settings import CheckedSettings, split_at_commas

Names = Annotated[list[str], BeforeValidator(split_at_commas)]
NO_METRIC = "none"


class EvalRequest(CheckedSettings):
    """What models are judged on and by.  Build it with ``EvalRequest.of``."""

    data: str | None = Field(
        None,
        min_length=1,
        description="rows with the answers wanted: file, folder or hub data set [a run's own]",
    )
    shape: str | None = Field(
        None,
        min_length=1,
        description="what the rows are: a shape, or prompt=COLUMN,completion=COLUMN [detected]",
    )
    encoding: Encoding = Field(None, description="encoding of text files [UTF-8, or what their bytes tell]")
    leave_out: LeftOut = Field(
        [], description="columns, and kinds of parts of messages, to pass over, with commas between them"
    )
    skip_bad: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="share of bad rows to leave out and count"
    )
    rows: int | None = Field(None, ge=1, description="take so many rows, spread over the file [all]")
    metrics: Names = Field(
        [],
        description=f"what to measure beside the loss, with commas between them: {', '.join(NAMES[3:])}; or "
        "none [by the kind of the answers]",
    )
    labels: Names = Field(
        [], description="all labels there are, with commas between them [those of the rows]"
    )
    choices: str | None = Field(None, min_length=1, description="column with the choices of each row, a list")
    pattern: re.Pattern[str] | None = Field(
        None, description="regular expression: what it finds last (its first group) must be the same"
    )
    function: str | None = Field(
        None, description="FILE.py:NAME, a function of answer, wanted and row that gives a number"
    )
    tasks: Names = Field(
        [], description="tasks of lm-evaluation-harness, where it is installed, with commas between them"
    )
    tasks_folder: Path | None = Field(None, description="folder with tasks of your own for the harness")
    answered: Names = Field(
        [], description="columns of the rows that hold answers to judge, with commas between them"
    )
    train_on: TrainOn = Field("assistant", description="the turns whose loss counts: assistant, last or all")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="longest answer in tokens [128; if labels, a little more than theirs]",
    )
    at_once: int = Field(AT_ONCE, ge=1, le=4096, description="rows answered together, if memory allows")
    shown: int = Field(5, ge=0, le=100, description="rows to show where models differ most")
    out: Path | None = Field(
        None, description="folder for the page, the numbers and all answers; must not exist [only printed]"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the intervals")

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, metrics: list[str]) -> list[str]:
        wrong = [f"{name!r}{nearest(name, NAMES)}" for name in metrics if name not in (*NAMES, NO_METRIC)]
        if wrong:
            raise ValueError(f"no metric {', '.join(wrong)}; known are {', '.join(NAMES)}")
        return metrics

    @model_validator(mode="after")
    def _have_what_they_need(self) -> EvalRequest:
        for name, given in ((PATTERN, self.pattern), (FUNCTION, self.function)):
            if name in self.metrics and given is None:
                raise ValueError(f"the metric {name} needs --{name}")
        if self.answered and self.data is None:
            raise ValueError("answered names columns of data, and there is none")
        return self
