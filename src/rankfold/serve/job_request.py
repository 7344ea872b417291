"""What a client asks of a fine-tuning job, in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictStr, model_validator

from rankfold.serve.schema import Given, Name

Auto = Literal["auto"]
FileName = Annotated[StrictStr, Field(pattern=r"^file-[0-9a-f]{24}$")]


class Hyperparameters(Given):
    """ "auto", and what is left out, is rankfold's own choice from the rows and the model."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = "auto"


class Supervised(Given):
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Given):
    type: Literal["supervised"]
    supervised: Supervised = Field(default_factory=Supervised)


class JobRequest(Given):
    model: Name
    training_file: FileName
    validation_file: FileName | None = None
    suffix: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> JobRequest:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("hyperparameters stand in method.supervised or beside it, not in both")
        return self

    @property
    def chosen(self) -> Hyperparameters:
        if self.method is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

    def hyperparameters_told(self) -> dict[str, Any]:
        return self.chosen.model_dump()

    def method_told(self) -> dict[str, Any]:
        return {"type": "supervised", "supervised": {"hyperparameters": self.chosen.model_dump()}}
