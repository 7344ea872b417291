"""``get_peft_model`` and the wrapped model, with the calls of PEFT's ``PeftModel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from rankfold.errors import ConfigError, MergeError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import check_adapter_name
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, LoadOptions, LoadResult
from rankfold.lora.layers.base import adapter_layers
from rankfold.lora.layers.packed import numbers_not_shown
from rankfold.lora.placing import merging
from rankfold.lora.placing.inject import (
    activate,
    freeze,
    inject,
    no_garbage_collection,
    remove,
    remove_adapter,
)
from rankfold.lora.placing.non_lora_params import check_together, find_extras, place_extras
from rankfold.lora.placing.parameter_targets import (
    checked_parameters,
    inject_parameters,
    owners_of,
    parameter_targets,
)
from rankfold.lora.placing.prepare import prepared, read_config, refuse_adapted
from rankfold.lora.placing.replication import end_replication, replicated
from rankfold.lora.placing.ties import find_heads, place_heads, with_leaders
from rankfold.lora.placing.transformer_encoder import pack_without_grad
from rankfold.peft_surface.saving_and_loading import load_onto, save_from


def for_one_batch(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call without PEFT's ``adapter_names``, one for each sample.

    Raises ConfigError if that is given."""
    if kwargs.pop("adapter_names", None) is not None:
        raise ConfigError(
            "adapter_names: a batch for several adapters is not supported by this version of rankfold; "
            "set_adapter(name) and call the model once for each adapter"
        )
    return kwargs


class LoraModel(nn.Module):
    """Holds the adapted model as ``model``, so that keys read ``base_model.model.<name>`` as in PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(nn.Module):
    """A model whose chosen layers carry named LoRA adapters; everything else is frozen.

    The layers are adapted in place: the model passed in is the one inside (``get_base_model``).
    Attributes that are not found here are looked up on that model."""

    # transformers' Trainer asks this before it trains a quantised model: adapters are on it.
    _hf_peft_config_loaded = True

    @no_garbage_collection()
    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        source: AdapterSource | None = None,
    ) -> None:
        """Wrap ``model`` with a fresh adapter, or with the one in ``source``, whose config is given."""
        super().__init__()
        refuse_adapted(model)
        self.widen = autocast_adapter_dtype
        self.peft_config: dict[str, LoraConfig] = {}
        self.adapter_metadata: dict[str, AdapterMetadata] = {}
        self.targeted_module_names: list[str] = []
        self._active: list[str] = [adapter_name]
        self.base_model = LoraModel(model)
        with replicated(model, peft_config):
            if source is None:
                self._place(adapter_name, *prepared(model, peft_config))
            else:
                load_onto(self, adapter_name, peft_config, source)
        freeze(model)
        self._settle(trainable=not peft_config.inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **for_one_batch(kwargs))

    def get_base_model(self) -> nn.Module:
        """The model inside, its layers adapted."""
        return self.base_model.model

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the adapters name in ``modules_to_save``, or None if they name nothing."""
        return {n for config in self.peft_config.values() for n in config.modules_to_save or ()} or None

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The dotted names of the parameters that carry adapters (``target_parameters``)."""
        return parameter_targets(self.get_base_model())

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add an adapter beside the others, not active yet.

        Raises ConfigError if the name is taken, TargetError if nothing matches; nothing is changed then."""
        model, trainable = self.get_base_model(), self._any_trainable()
        with replicated(model, peft_config):
            self._place(adapter_name, *prepared(model, peft_config))
        self._settle(trainable=trainable)

    @no_garbage_collection()
    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        **options: Unpack[LoadOptions],
    ) -> LoadResult:
        """Load an adapter folder beside the others, not active yet; ``options`` are LoadOptions.

        Raises AdapterError listing all that does not fit; the model is then as it was."""
        trainable, source = self._any_trainable(), AdapterSource.of(model_id, options)
        config = read_config(source.folder, is_trainable)
        with replicated(self.get_base_model(), config):
            result = load_onto(self, adapter_name, config, source)
        self._settle(trainable=trainable)
        return result

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose updates are added, the active and trainable ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        check_together(self.get_base_model(), names)
        merging.unmerge(self.get_base_model())
        self._active = names
        self._settle(trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter.  Raises MergeError while it is merged, ConfigError if it is the last one."""
        self._check_known([adapter_name])
        if len(self.peft_config) == 1:
            raise ConfigError(f"{adapter_name!r} is the only adapter; unload() takes it off the model")
        if any(adapter_name in layer.merged_adapters for _, layer in adapter_layers(self)):
            raise MergeError(f"{adapter_name!r} is merged; unmerge_adapter() first")
        remove_adapter(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]
        self.adapter_metadata.pop(adapter_name, None)
        self._active = [name for name in self._active if name != adapter_name] or [
            next(iter(self.peft_config))
        ]
        self._settle(trainable=self._any_trainable())

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        **options: Unpack[LoadOptions],
    ) -> PeftModel:
        """Load an adapter folder (written by rankfold or PEFT) onto ``model``; ``options`` are LoadOptions.
        A ``config`` takes the place of the one in the folder, and is not changed.

        Every tensor must find its place with the right shape and finite values, every place its tensor,
        and the base must be the one it was saved with.  Raises AdapterError listing all that is not so;
        ``model`` is then as it was."""
        from rankfold.peft_surface.tasks import model_class

        source = AdapterSource.of(model_id, options)
        if config is None:
            config = read_config(source.folder, is_trainable)
        else:
            config = dataclasses.replace(config, inference_mode=not is_trainable)
        loaded = model_class(config)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            source=source,
        )
        return loaded.train(is_trainable)

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        *,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        facts: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, readable by PEFT: the adapter
        "default" into the folder itself, any other into a folder of its name inside it.

        With ``path_initial_model_for_weight_conversion``, the folder of the adapter as saved before it was
        trained, an adapter whose start changed the base weights (pissa, olora) is written as a plain one
        of twice the rank, which makes the tuned model of the base as it was.

        ``rankfold.json`` beside them holds what lets a later load tell that all is as it was; ``facts``
        are fields of AdapterMetadata to put into it, such as ``base``, the base's fingerprint, where it is
        known because the base has been cut among processes since.  No model card (README.md) is written.
        Words of
        PEFT that are not named here change nothing: the file is always one, and always safetensors."""
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        initial = path_initial_model_for_weight_conversion
        save_from(
            self,
            names,
            Path(save_directory),
            save_embeddings=save_embedding_layers,
            initial=None if initial is None else Path(initial),
            facts=facts or {},
        )

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Merge the named (or the active) adapters into the weights until ``unmerge_adapter``.

        The original weights stay in memory, so that unmerging gives back the exact bits.
        Raises MergeError, with nothing changed, where a weight would not stay finite or is tied."""
        names = self._active if adapter_names is None else list(adapter_names)
        self._check_known(names)
        merging.merge(self.get_base_model(), names)

    def unmerge_adapter(self) -> None:
        """Give the weights back the bits that they had before ``merge_adapter``."""
        merging.unmerge(self.get_base_model())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Fold the named (or the active) adapters into the base weights and return the plain model.

        Afterwards no layer differs in type from before the adaptation, so inference costs nothing extra.
        Every merge is checked (``safe_merge`` and ``progressbar`` are PEFT's words and change nothing).
        Raises MergeError, with nothing changed, where a weight would not stay finite or is tied."""
        names = self._active if adapter_names is None else list(adapter_names)
        self._check_known(names)
        model = self.get_base_model()
        merging.unmerge(model)
        merging.merge_and_restore(model, names)
        pack_without_grad(model)
        return model

    def unload(self) -> nn.Module:
        """Drop all adapters and return the base model as it was."""
        remove(self.get_base_model())
        end_replication(self.get_base_model())
        pack_without_grad(self.get_base_model())
        return self.get_base_model()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base computes, merged adapters included."""
        model = self.get_base_model()
        layers = [layer for _, layer in adapter_layers(model)]
        before = [layer.disable_adapters for layer in layers]
        merged = {name: None for layer in layers for name in layer.merged_adapters}
        merging.unmerge(model)
        for layer in layers:
            layer.disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer.disable_adapters = disabled
            if merged:
                merging.merge(model, list(merged))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are in all, tied ones counted once."""
        parameters = list(self.parameters())
        total = sum(p.numel() for p in parameters) + numbers_not_shown(self)
        return sum(p.numel() for p in parameters if p.requires_grad), total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def _place(self, name: str, targets: list[str], config: LoraConfig) -> None:
        """Inject an adapter and note it."""
        check_adapter_name(name, self.peft_config)
        heads = find_heads(self.get_base_model(), targets, config)
        targets = with_leaders(targets, heads)
        parameters = checked_parameters(self.get_base_model(), targets, config, new=False)
        taken = [*targets, *owners_of(parameters)]
        extras = find_extras(self.get_base_model(), taken, config, self.peft_config)
        inject(self.get_base_model(), targets, config, name, widen=self.widen)
        place_heads(self.get_base_model(), heads, config, name)
        inject_parameters(self.get_base_model(), parameters, config, name, widen=self.widen)
        place_extras(self.get_base_model(), extras, name, config, widen=self.widen)
        self.peft_config[name] = config
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *targets]))

    def _settle(self, *, trainable: bool) -> None:
        """Make ``_active`` count, after every change of what there is."""
        activate(self.get_base_model(), self._active, trainable=trainable)
        pack_without_grad(self.get_base_model())

    def _any_trainable(self) -> bool:
        return any(p.requires_grad for _, layer in adapter_layers(self) for p in layer.parameters())

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            raise ConfigError(f"no adapter {unknown or names}; the model has {list(self.peft_config)}")


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Adapt the layers that ``peft_config`` names, in place, and wrap the model.

    The output is unchanged at first, to the last bit, because every lora_B starts at zero (unless
    ``init_lora_weights`` says otherwise).  The given config is copied, not changed; the copy's
    ``target_modules`` lists what was found.

    Raises TargetError if nothing matches or a match is no supported layer, ConfigError if a rank is
    larger than its weight or the model is adapted already."""
    from rankfold.peft_surface.tasks import model_class

    return model_class(peft_config)(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )
