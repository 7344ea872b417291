"""``get_peft_model`` and the wrapped model, with the calls of PEFT's ``PeftModel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.errors import ConfigError
from rankfold.lora.checkpoint import load_adapter_file, save_adapter
from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.inject import (
    adapter_parameters,
    check_ranks,
    inject,
    lora_layers,
    merge_and_restore,
    remove,
)
from rankfold.lora.targets import ALL_LINEAR, find_targets, module_names, resolve, shortest_list


class LoraModel(nn.Module):
    """Holds the adapted model as ``model``, so that keys read ``base_model.model.<name>`` as in PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(nn.Module):
    """A model whose chosen layers carry a LoRA adapter; everything else is frozen.

    The layers are adapted in place: the model passed in is the one inside (``get_base_model``).
    Attributes that are not found here are looked up on that model."""

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str, targets: list[str]) -> None:
        super().__init__()
        _check_adapter_name(adapter_name)
        inject(model, targets, config, adapter_name)
        self.base_model = LoraModel(model)
        self.peft_config = {adapter_name: config}
        self.active_adapter = adapter_name
        self.targeted_module_names = targets

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """Load an adapter folder (written by rankfold or PEFT) onto ``model``.

        Every tensor must find its place with the right shape and finite values, and every place its
        tensor.  Raises AdapterError listing all that do not; ``model`` is then as it was."""
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        _refuse_adapted(model)
        targets = find_targets(model, config, every_entry=False)
        loaded = _model_class(config)(model, config, adapter_name, targets)
        try:
            load_adapter_file(adapter_parameters(model, adapter_name), Path(folder))
        except BaseException:
            remove(model)
            raise
        return loaded.train(is_trainable)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, readable by PEFT."""
        name = self.active_adapter
        save_adapter(adapter_parameters(self.get_base_model(), name), self.peft_config[name], Path(folder))

    def get_base_model(self) -> nn.Module:
        """The model inside, its layers adapted."""
        return self.base_model.model

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapter into the base weights and return the plain model.

        Afterwards no layer differs in type from before the adaptation, so inference costs nothing extra.
        Raises MergeError, with nothing changed, where a weight would not stay finite or is tied."""
        merge_and_restore(self.get_base_model())
        return self.get_base_model()

    def unload(self) -> nn.Module:
        """Drop the adapter and return the base model as it was."""
        remove(self.get_base_model())
        return self.get_base_model()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base computes."""
        layers = [layer for _, layer in lora_layers(self.get_base_model())]
        before = [layer.disable_adapters for layer in layers]
        for layer in layers:
            layer.disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer.disable_adapters = disabled

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are in all, tied ones counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


class PeftModelForCausalLM(PeftModel):
    """A language model; ``forward`` names its inputs because trainers read its signature."""

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


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Adapt the layers that ``peft_config`` names, in place, and wrap the model.

    The output is unchanged at first, to the last bit, because every lora_B starts at zero (unless
    ``init_lora_weights`` is False).  The given config is copied, not changed; the copy's
    ``target_modules`` lists what was found.

    Raises TargetError if nothing matches or a match is no supported layer, ConfigError if a rank is
    larger than its weight or the model is adapted already."""
    _refuse_adapted(model)
    targets = find_targets(model, peft_config)
    check_ranks(model, targets, peft_config)
    config = dataclasses.replace(peft_config, **_spelt_out(model, targets, peft_config))
    base_name = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "name_or_path", None
    )
    config.base_model_name_or_path = config.base_model_name_or_path or base_name or None
    if config.task_type is None:
        kind = type(model)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return _model_class(config)(model, config, adapter_name, targets)


def _spelt_out(model: nn.Module, targets: list[str], config: LoraConfig) -> dict[str, Any]:
    """``target_modules`` as names where the config left the choice to the model."""
    wanted = config.target_modules
    if wanted is None:
        usual = resolve(model, config)
        return {"target_modules": usual if isinstance(usual, str) else sorted(usual)}
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return {"target_modules": shortest_list(targets, module_names(model)), "exclude_modules": None}
    return {}


def _model_class(config: LoraConfig) -> type[PeftModel]:
    return PeftModelForCausalLM if config.task_type == TaskType.CAUSAL_LM else PeftModel


def _refuse_adapted(model: nn.Module) -> None:
    if any(True for _ in lora_layers(model)):
        raise ConfigError(
            "this model carries an adapter already; merge_and_unload() or unload() it first "
            "(several adapters on one model come with a later version)"
        )


def _check_adapter_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: a name has no dot and is not one of torch's own words"
        )
