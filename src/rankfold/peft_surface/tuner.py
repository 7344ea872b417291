"""``LoraModel``: the adapters of one model and everything that is done with them, by PEFT's names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, MergeError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, LoadResult
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.placing import merging
from rankfold.lora.placing.non_lora_params import check_together
from rankfold.lora.placing.parameter_targets import parameter_targets
from rankfold.lora.placing.placement import (
    activate,
    find_placement,
    freeze,
    no_garbage_collection,
    place,
    remove,
    remove_adapter,
    trained_names,
)
from rankfold.lora.placing.replication import end_replication, replicated
from rankfold.lora.placing.targets import USUAL_TARGETS, is_target
from rankfold.lora.placing.transformer_encoder import pack_without_grad
from rankfold.lora.variants import kasa
from rankfold.lora.variants.monteclora import MontecloraSampler
from rankfold.peft_surface.findings import (
    PREFIX_OF_TENSORS,
    buffer_versions,
    config_of,
    ties_ended,
    warn_of_starts_together,
)
from rankfold.peft_surface.mixed_batch import forward_words
from rankfold.peft_surface.saving_and_loading import load_onto
from rankfold.peft_surface.weighted import Combination, add_weighted_adapter

WORD = "peft_config"  # under this name a model knows the configs of its adapters, as in PEFT


class LoraModel(nn.Module):
    """Holds the adapted model as ``model``, so that keys read ``base_model.model.<name>`` as in PEFT.

    The layers are adapted in place: ``model`` is the object that was passed in, its other parameters are
    frozen.  Attributes that are not found here are looked up on it."""

    prefix: ClassVar[str] = PREFIX_OF_TENSORS
    tuner_layer_cls: ClassVar[type[nn.Module]] = LoraLayer
    target_module_mapping: ClassVar[Mapping[str, Any]] = USUAL_TARGETS
    uses_shared_state: ClassVar[bool] = False

    @no_garbage_collection()
    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | Mapping[str, LoraConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        source: AdapterSource | None = None,
    ) -> None:
        """Put a fresh adapter on ``model``, or the one in ``source``, whose config is given."""
        super().__init__()
        configs = config if isinstance(config, Mapping) else {adapter_name: config}
        self.model, self.widen = model, autocast_adapter_dtype
        self.adapter_metadata: dict[str, AdapterMetadata] = {}
        self.targeted_module_names: list[str] = []
        self._active = [adapter_name]
        self._may_train = {*vars(model).get(WORD, ())}  # adapters that some call may have let be trained
        self.buffer_versions = buffer_versions(model)
        known = vars(model).get(WORD)
        if known:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple "
                f"adapters in the model ({', '.join(known)}). Make sure to know what you are doing!",
                stacklevel=4,
            )
        vars(model).setdefault(WORD, {})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        freeze(model)
        try:
            for name, each in configs.items():
                if name in self.peft_config:
                    self.delete_adapter(name)
                self._active = [adapter_name]
                self.add(name, each, source=source, without_memory=low_cpu_mem_usage)
        except BaseException:
            if not self.peft_config:
                del vars(model)[WORD]
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        first = self.peft_config[adapter_name]
        self.set_adapter(adapter_name, inference_mode=first.inference_mode)

    @classmethod
    def around(cls, model: nn.Module) -> LoraModel:
        """A LoraModel of a model whose layers carry adapters already, for the length of a call."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model, self.widen = model, True
        self.adapter_metadata, self.targeted_module_names, self.buffer_versions = {}, [], {}
        self._may_train = trained_names(model)
        self._active = next((layer.active_adapters for _, layer in adapter_layers(model)), [])
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        try:
            return getattr(self.model, name)
        except AttributeError as error:
            inner = type(self.model).__name__
            raise AttributeError(f"neither LoraModel nor the {inner} inside has {name!r}") from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        found: dict[str, LoraConfig] = vars(self.model).get(WORD, {})
        return found

    @peft_config.setter
    def peft_config(self, configs: dict[str, LoraConfig]) -> None:
        vars(self.model)[WORD] = configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The dotted names of the parameters that carry adapters (``target_parameters``)."""
        return parameter_targets(self.model)

    def add(
        self,
        name: str,
        config: LoraConfig,
        *,
        source: AdapterSource | None = None,
        without_memory: bool = False,
        widen: bool | None = None,
    ) -> LoadResult | None:
        """Put an adapter beside the others, fresh or from ``source``; it is not active, and not trained.

        Raises what ``find_placement`` and ``load_onto`` raise; the model is then as it was."""
        widen = self.widen if widen is None else widen
        warn_of_starts_together([config, *self.peft_config.values()])
        with replicated(self.model, config):
            if source is None:
                placement = find_placement(self.model, config, name, self.peft_config)
                place(self.model, placement, name, widen=widen, without_memory=without_memory)
                result = None
                self.note(name, placement.config, placement.targets)
            else:
                result = load_onto(self, name, config, source, widen=widen)
        self._settle(frozen=[name])
        return result

    def note(self, name: str, config: LoraConfig, targets: Collection[str]) -> None:
        """Know an adapter that is in place."""
        vars(self.model).setdefault(WORD, {})[name] = config
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *targets]))

    def replace(self, name: str, config: LoraConfig) -> None:
        """Put a fresh adapter of ``config`` in the place of ``name``, as active and as trained as it was."""
        trained = name in trained_names(self.model)
        remove_adapter(self.model, name)
        del self.peft_config[name]
        self.add(name, config)
        self._settle([name] if trained else [], frozen=[] if trained else [name])

    def inject_adapter(self, model: nn.Module, adapter_name: str, **options: Any) -> None:
        self.add(adapter_name, self.peft_config.pop(adapter_name), **options)

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, **options: Any) -> None:
        self.add(adapter_name, peft_config, **options)

    def set_adapter(self, adapter_name: str | Collection[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose updates are added, the active ones, trained unless
        ``inference_mode``.  What is merged is unmerged first."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_known(names, "Adapter {} not found.")
        layers = [*adapter_layers(self.model)]
        check_together(layers, names)
        merging.unmerge_layers([layer for _, layer in layers])
        self._active, trained = names, [] if inference_mode else names
        activate([layer for _, layer in layers], names, trained=trained, frozen=self._may_train - {*trained})
        self._may_train = {*trained}

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; of the last one nothing stays on the layers.  Raises MergeError while it is
        merged."""
        self.check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for _, layer in adapter_layers(self.model)):
            raise MergeError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        trained = trained_names(self.model)
        remove_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self.adapter_metadata.pop(adapter_name, None)
        if adapter_name in self._active:
            self._active = [name for name in self._active if name != adapter_name]
            if not self._active and self.peft_config:
                self._active = sorted(self.peft_config)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
                    f"{self._active[0]}.",
                    stacklevel=3,
                )
                trained |= {*self._active}
        self._settle(trained)

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Train, or do not train, the tensors of the named adapters, active or not."""
        names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        self._may_train |= names if requires_grad else set()
        for _, layer in adapter_layers(self.model):
            layer.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self) -> None:
        for _, layer in adapter_layers(self.model):
            layer.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Let the model compute what the base computes, until ``enable_adapter_layers``."""
        merging.unmerge(self.model)
        for _, layer in adapter_layers(self.model):
            layer.enable_adapters(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes what the base computes; afterwards all is as it was."""
        layers = [layer for _, layer in adapter_layers(self.model)]
        before = [layer.disable_adapters for layer in layers]
        merged = {name: None for layer in layers for name in layer.merged_adapters}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for layer, was_disabled in zip(layers, before, strict=True):
                layer.__dict__["_disabled"] = was_disabled
                layer.refresh()
            for parameter in trained:
                parameter.requires_grad_(True)
            if merged:
                merging.merge(self.model, list(merged))

    def merge_adapter(self, adapter_names: Collection[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the named (or the active) adapters into the weights until ``unmerge_adapter``, beside what is
        merged already; the other active ones are added as before, and unmerging gives back the exact bits.

        Every merge is checked (``safe_merge`` is PEFT's word).  Raises MergeError, with nothing changed,
        where a weight would not stay finite."""
        names = self._active_on_layers() if adapter_names is None else list(adapter_names)
        self.check_known(names)
        done = {n for _, layer in adapter_layers(self.model) for n in layer.merged_adapters}
        new = [name for name in names if name not in done]
        if not new:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        if done:
            warnings.warn(
                f"Already following adapters were merged {','.join(sorted(done))}. You are now additionally "
                f"merging {','.join(new)}.",
                stacklevel=3,
            )
        merging.merge(self.model, new)

    def unmerge_adapter(self) -> None:
        """Give the weights back the bits that they had before ``merge_adapter``."""
        if not any(layer.merged for _, layer in adapter_layers(self.model)):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        merging.unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Collection[str] | None = None,
    ) -> nn.Module:
        """Fold the named (or the active) adapters into the base weights and return the plain model, whose
        layers are of the types that they had.  Every merge is checked (``safe_merge`` and ``progressbar`` are
        PEFT's words).  Raises MergeError, with nothing changed, where a weight would not stay finite."""
        names = self._active_on_layers() if adapter_names is None else list(adapter_names)
        self.check_known(names)
        config = getattr(self.model, "config", None)
        if done := vars(self.model).get("_layer_replication"):
            raise MergeError(
                f"Cannot merge LORA layers when base model layers are replicated ({done.ranges}): they share "
                "their weights"
            )
        merging.unmerge(self.model)
        merging.merge_and_restore(self.model, names)
        self._forget()
        if ties_ended(self.model):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            warnings.warn(
                "Input and output embeddings are no longer tied after merging. Setting "
                "`tie_word_embeddings=False` in the model config.",
                stacklevel=3,
            )
        return self.model

    def unload(self) -> nn.Module:
        """Drop all adapters and return the base model as it was."""
        remove(self.model)
        end_replication(self.model)
        self._forget()
        return self.model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Make a new adapter of a weighted sum of others; see ``weighted.add_weighted_adapter``."""
        self.check_known(adapters)
        add_weighted_adapter(self, adapters, weights, adapter_name, Combination(combination_type, **options))

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Within the block ``adapter_names`` and ``alora_offsets`` hold for each row of a batch."""
        with forward_words(self.model, self.peft_config, kwargs):
            yield

    def _get_monteclora_loss(self) -> Tensor:
        """What MonteCLoRA adds to the loss, summed over all layers; zero in eval mode."""
        samplers = [module for module in self.model.modules() if isinstance(module, MontecloraSampler)]
        return sum((sampler.variational_loss() for sampler in samplers), torch.zeros(()))

    def _get_kasa_loss(self, adapter_names: str | Collection[str] | None = None) -> Tensor | float:
        """What KaSA adds to the loss, summed over the layers of the named, or the active, adapters; 0.0
        without any."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        layers = [layer for _, layer in adapter_layers(self.model)]
        found = kasa.loss_of(layers, [wanted] if isinstance(wanted, str) else wanted)
        return 0.0 if found is None else found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapters can become LoRA: they are LoRA."""
        return False

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of a model as a dictionary."""
        return config_of(model)

    @staticmethod
    def _check_target_module_exists(peft_config: LoraConfig, key: str) -> bool:
        wanted = peft_config.target_modules
        return is_target(key, wanted if isinstance(wanted, str) else frozenset(wanted or ()), peft_config)

    def check_known(self, names: Collection[str], text: str = "Adapter {} does not exist") -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            told = "; ".join(text.format(name) for name in unknown) or "no adapter is named"
            raise ConfigError(f"{told}; the model has {list(self.peft_config)}")

    def _active_on_layers(self) -> list[str]:
        """The active adapters, those too that were set on layers one by one."""
        every = [name for _, layer in adapter_layers(self.model) for name in layer.active_adapters]
        return [name for name in dict.fromkeys([*self._active, *every]) if name in self.peft_config]

    def _settle(self, trained: Collection[str] = (), frozen: Collection[str] = ()) -> None:
        """Make ``_active`` count, after every change of what there is."""
        self._may_train |= {*trained}
        layers = [layer for _, layer in adapter_layers(self.model)]
        activate(layers, self._active, trained=trained, frozen=frozen)
        pack_without_grad(self.model)

    def _forget(self) -> None:
        vars(self.model).pop(WORD, None)
        self.adapter_metadata.clear()
        pack_without_grad(self.model)
