"""``AutoPeftModel*``: an adapter folder with the base model that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Unpack

from rankfold.errors import AdapterError, ModelError
from rankfold.lora import LoraConfig, TaskType
from rankfold.lora.files.adapter_reader import AdapterSource, LoadOptions
from rankfold.models.base.find import find_base
from rankfold.models.base.fitting import grow_vocabulary
from rankfold.models.base.load import load_weights
from rankfold.peft_surface import PeftModel


class AutoPeftModel:
    """An adapter without a task type, on the model class that its ``auto_mapping`` names.

    That class is looked up among transformers' own and nowhere else: no module that a file names is
    imported, no code from a model folder is run, and only safetensors weights are read."""

    task_type: ClassVar[str | None] = None
    auto_class: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not made but loaded: use its from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        dtype: Any = None,
        **options: Unpack[LoadOptions],
    ) -> PeftModel:
        """Load the base (from a folder, an installed package or the hub, see ``find_base``) in ``dtype``,
        its own by default, and the adapter onto it; ``options`` are LoadOptions.

        Raises AdapterError if the adapter is for another task or does not fit, ModelError for the base."""
        config = LoraConfig.from_pretrained(AdapterSource.of(folder, options).folder)
        name = config.base_model_name_or_path
        if not name:
            raise ModelError(f"{folder} does not say which base model it belongs to")
        model = load_weights(find_base(name), cls._model_class(folder, config), dtype, config.revision)
        grow_vocabulary(model, Path(folder))
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable, **options)

    @classmethod
    def _model_class(cls, folder: str | Path, config: LoraConfig) -> Any:
        import transformers

        if config.task_type != cls.task_type:
            known = {kind.task_type: kind.__name__ for kind in AUTO_CLASSES}
            use = known[None if config.task_type is None else str(config.task_type)]
            raise AdapterError(f"{folder} is for the task {config.task_type}; load it with {use}")
        if cls.auto_class is not None:
            return getattr(transformers, cls.auto_class)
        named = (config.auto_mapping or {}).get("base_model_class")
        found = getattr(transformers, named, None) if isinstance(named, str) else None
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise AdapterError(
                f"{folder} names the model class {named!r:.200}, which is none of transformers'; "
                "load the base yourself and use PeftModel.from_pretrained"
            )
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type = TaskType.CAUSAL_LM
    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type = TaskType.SEQ_2_SEQ_LM
    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type = TaskType.SEQ_CLS
    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type = TaskType.TOKEN_CLS
    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type = TaskType.QUESTION_ANS
    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type = TaskType.FEATURE_EXTRACTION
    auto_class = "AutoModel"


AUTO_CLASSES = (
    *(AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM),
    *(AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification),
    *(AutoPeftModelForQuestionAnswering, AutoPeftModelForFeatureExtraction),
)
