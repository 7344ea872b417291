"""One wrapper class a task: ``forward`` names its inputs because trainers read its signature.

The names and their order are PEFT's.  What is not given is not passed on, so a base model need not know
all of them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from rankfold.lora.config.lora_config import LoraConfig, TaskType
from rankfold.peft_surface.model import PeftModel

TEXT = ("input_ids", "attention_mask", "inputs_embeds")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
FORM = ("output_attentions", "output_hidden_states", "return_dict")


def forward_of(*names: str) -> Callable[..., Any]:
    """A ``forward`` with the inputs ``names``, all None by default, and any others by keyword."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"forward takes the inputs {', '.join(names)}, got {len(args)} by position")
        inputs = dict(zip(names, args, strict=False))
        if twice := inputs.keys() & kwargs.keys():
            raise TypeError(f"forward got twice: {', '.join(sorted(twice))}")
        inputs |= kwargs
        given = {name: v for name, v in inputs.items() if v is not None or name not in names}
        return PeftModel.forward(self, **given)

    plain = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter("self", plain), *(Parameter(name, plain, default=None) for name in names)]
    signature = Signature([*parameters, Parameter("kwargs", Parameter.VAR_KEYWORD)])
    setattr(forward, "__signature__", signature)  # noqa: B010 - mypy refuses the plain assignment
    return forward


class PeftModelForSequenceClassification(PeftModel):
    """A model that labels a whole text."""

    forward = forward_of(*TEXT, "labels", *FORM)


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A model that labels every token."""


class PeftModelForCausalLM(PeftModelForSequenceClassification):
    """A language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A model that reads one text and writes another."""

    forward = forward_of(*TEXT, *DECODER, "labels", *FORM)

    def generate(self, **kwargs: Any) -> Any:
        """``PeftModel.generate``; inputs by name only, as in PEFT."""
        return super().generate(**kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """A model that finds the answer in a text.  ``token_type_ids`` and ``position_ids`` reach the base
    model; PEFT 0.21.2 takes and drops them."""

    forward = forward_of(
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions", *FORM),
    )


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives hidden states."""

    forward = forward_of(*TEXT, *FORM)


class PeftMixedModel(PeftModel):
    """PEFT's class for adapters of several methods on one model; there is one method here."""


MODEL_CLASSES: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class(config: LoraConfig) -> type[PeftModel]:
    """The wrapper class for a config's task type."""
    return MODEL_CLASSES.get(str(config.task_type), PeftModel)
