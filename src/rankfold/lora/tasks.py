"""One wrapper class a task: ``forward`` names its inputs because trainers read its signature.

The names and their order are PEFT's.  What is not given is not passed on, so a base model need not know
all of them."""

from __future__ import annotations

from typing import Any

from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """A model that labels a whole text."""

    def forward(  # noqa: PLR0913, PLR0917 - PEFT's signature
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"labels": labels, "output_attentions": output_attentions}
        inputs |= {"output_hidden_states": output_hidden_states, "return_dict": return_dict}
        return super().forward(**given(inputs), **kwargs)


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A model that labels every token."""


class PeftModelForCausalLM(PeftModelForSequenceClassification):
    """A language model."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return generate(self, *args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """A model that reads one text and writes another."""

    def forward(  # noqa: PLR0913, PLR0917 - PEFT's signature
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        inputs |= {"decoder_inputs_embeds": decoder_inputs_embeds, "labels": labels}
        inputs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        return super().forward(**given(inputs | {"return_dict": return_dict}), **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return generate(self, *args, **kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """A model that finds the answer in a text.  ``token_type_ids`` and ``position_ids`` reach the base
    model; PEFT 0.21.2 takes and drops them."""

    def forward(  # noqa: PLR0913, PLR0917 - PEFT's signature
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs |= {"start_positions": start_positions, "end_positions": end_positions}
        inputs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        return super().forward(**given(inputs | {"return_dict": return_dict}), **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives hidden states."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        return super().forward(**given(inputs | {"return_dict": return_dict}), **kwargs)


def given(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def generate(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """The base model's ``generate``, under the ``generation_config`` that was set on the wrapper, if any."""
    own = model.__dict__.get("generation_config")
    if own is not None:
        kwargs.setdefault("generation_config", own)
    return model.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]


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
