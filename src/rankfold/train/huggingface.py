"""An adapter in transformers' ``Trainer`` and in what is derived from it, such as TRL's ``SFTTrainer``.

Trainer knows adapters of PEFT's class only.  Any other wrapper it takes for the whole model: it writes all
weights, stops at tied ones, shifts no labels under label smoothing, and refuses a quantised base."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankfold.errors import AdapterError, ConfigError, TrainingError, bullet_list
from rankfold.lora import LoraConfig
from rankfold.lora.files.adapter_reader import AdapterSource, read_adapter
from rankfold.lora.files.checkpoint import file_tensors, fill_adapter
from rankfold.lora.files.saved_embeddings import find_brought
from rankfold.peft_surface import PeftModel

# Keys of adapter_config.json that say nothing about what the adapter computes or trains.
INCIDENTAL = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


class AdapterCheckpoints:
    """Put before a trainer's class, it makes that trainer take a ``PeftModel`` of rankfold:
    ``class AdapterSFTTrainer(AdapterCheckpoints, SFTTrainer): pass``.

    A checkpoint then holds the adapters and the optimiser, scheduler and random states, so a resumed run
    goes on as if it had not stopped; no base weights, and no pickled training arguments.  The trainer is
    set up with the model inside, of which it knows what it is, and trains the wrapper."""

    def __init__(self, model: PeftModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, PeftModel):
            raise ConfigError(
                f"{type(self).__name__} trains a model from get_peft_model(), got a {type(model).__name__}"
            )
        base = model.get_base_model()
        with _marked_as_adapted(base):
            super().__init__(base, *args, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise TrainingError(
                "an adapter cannot be trained under DeepSpeed or FSDP yet; use one device or DDP"
            )
        trainer._set_signature_columns_if_needed()  # those of the model inside
        if trainer.label_smoother is not None and _predicts_next_token(base):
            trainer.label_smoother = functools.partial(trainer.label_smoother, shift_labels=True)
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trainer: Any = self
        if not trainer.args.should_save:
            return
        folder = Path(output_dir or trainer.args.output_dir)
        trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).save_pretrained(folder)
        processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        load_checkpoint(trainer.accelerator.unwrap_model(model or trainer.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        load_checkpoint(trainer.accelerator.unwrap_model(trainer.model), trainer.state.best_model_checkpoint)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """``transformers.Trainer`` for a model from ``get_peft_model``; its checkpoints are adapter folders."""


def load_checkpoint(model: PeftModel, folder: str | Path) -> None:
    """Give every adapter of ``model`` the values in ``folder``, as ``save_pretrained`` wrote them there.

    Raises AdapterError if a file is missing, does not fit, or was trained under another config."""
    base = model.get_base_model()
    for name, config in model.peft_config.items():
        place = Path(folder) if name == "default" else Path(folder) / name
        saved = LoraConfig.from_pretrained(place)
        if differences := _differences(saved, config):
            raise AdapterError(bullet_list(f"{place} is a checkpoint of another adapter:", differences))
        stored = read_adapter(AdapterSource(place), saved, base)
        wanted = file_tensors(base, name, config)
        frozen = find_brought(base, stored.tensors, wanted, config)  # embeddings, the same all along
        fill_adapter(stored, wanted | {key: value for key, (_, value) in frozen.items()})


def _differences(saved: LoraConfig, config: LoraConfig) -> list[str]:
    """Every key in which two configs mean something else."""
    left, right = (
        {key: sorted(value) if isinstance(value, list) else value for key, value in plain.items()}
        for plain in (json.loads(json.dumps(one.to_dict())) for one in (saved, config))
    )
    keys = [key for key in right if key not in INCIDENTAL and left.get(key) != right[key]]
    return [f"{key}: the checkpoint has {left.get(key)!r}, the model {right[key]!r}" for key in keys]


@contextmanager
def _marked_as_adapted(base: nn.Module) -> Iterator[None]:
    """Within the block ``base`` has the mark by which transformers lets a quantised model be trained.

    It stays no longer: with the mark, transformers would take its saving to be PEFT's."""
    base.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del base.__dict__["_hf_peft_config_loaded"]


def _predicts_next_token(base: nn.Module) -> bool:
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
