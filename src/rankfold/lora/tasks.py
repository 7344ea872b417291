"""One wrapper class a task: ``forward`` names its inputs because trainers read its signature."""

from __future__ import annotations

from typing import Any

from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A language model."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]


MODEL_CLASSES: dict[str, type[PeftModel]] = {TaskType.CAUSAL_LM: PeftModelForCausalLM}


def model_class(config: LoraConfig) -> type[PeftModel]:
    """The wrapper class for a config's task type."""
    return MODEL_CLASSES.get(str(config.task_type), PeftModel)
