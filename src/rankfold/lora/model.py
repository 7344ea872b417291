"""``get_peft_model`` and the wrapped model, with the calls of PEFT's ``PeftModel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.errors import ConfigError, MergeError
from rankfold.lora import merging
from rankfold.lora.checkpoint import load_adapter_file, save_adapter
from rankfold.lora.config import LoraConfig
from rankfold.lora.inject import activate, check_ranks, check_targets, freeze, inject, remove, remove_adapter
from rankfold.lora.layers import AdapterLayer, adapter_layers
from rankfold.lora.targets import ALL_LINEAR, find_targets, module_names, resolve, shortest_list


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

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        folder: Path | None = None,
    ) -> None:
        """Wrap ``model`` with a fresh adapter, or with the one in ``folder``, whose config is given."""
        super().__init__()
        refuse_adapted(model)
        self.widen = autocast_adapter_dtype
        self.peft_config: dict[str, LoraConfig] = {}
        self.targeted_module_names: list[str] = []
        self._active: list[str] = [adapter_name]
        self.base_model = LoraModel(model)
        if folder is None:
            self._place(adapter_name, *prepared(model, peft_config))
        else:
            self._load(adapter_name, peft_config, folder)
        freeze(model)
        activate(model, self._active, trainable=not peft_config.inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The model inside, its layers adapted."""
        return self.base_model.model

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add an adapter beside the others, not active yet.

        Raises ConfigError if the name is taken, TargetError if nothing matches; nothing is changed then."""
        model, trainable = self.get_base_model(), self._any_trainable()
        self._place(adapter_name, *prepared(model, peft_config))
        activate(model, self._active, trainable=trainable)

    def load_adapter(self, folder: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Load an adapter folder beside the others, not active yet.

        Raises AdapterError listing all that does not fit; the model is then as it was."""
        trainable = self._any_trainable()
        self._load(adapter_name, read_config(folder, is_trainable), Path(folder))
        activate(self.get_base_model(), self._active, trainable=trainable)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose updates are added, the active and trainable ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        merging.unmerge(self.get_base_model())
        self._active = names
        activate(self.get_base_model(), names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter.  Raises MergeError while it is merged, ConfigError if it is the last one."""
        self._check_known([adapter_name])
        if len(self.peft_config) == 1:
            raise ConfigError(f"{adapter_name!r} is the only adapter; unload() takes it off the model")
        if any(adapter_name in layer.merged_adapters for _, layer in adapter_layers(self)):
            raise MergeError(f"{adapter_name!r} is merged; unmerge_adapter() first")
        remove_adapter(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]
        self._active = [name for name in self._active if name != adapter_name] or [
            next(iter(self.peft_config))
        ]
        activate(self.get_base_model(), self._active, trainable=self._any_trainable())

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> PeftModel:
        """Load an adapter folder (written by rankfold or PEFT) onto ``model``.

        Every tensor must find its place with the right shape and finite values, and every place its
        tensor.  Raises AdapterError listing all that do not; ``model`` is then as it was."""
        from rankfold.lora.tasks import model_class

        config = read_config(model_id, is_trainable)
        loaded = model_class(config)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            folder=Path(model_id),
        )
        return loaded.train(is_trainable)

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, readable by PEFT: the adapter
        "default" into the folder itself, any other into a folder of its name inside it."""
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_adapter(self.get_base_model(), name, self.peft_config[name], folder)

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
        return model

    def unload(self) -> nn.Module:
        """Drop all adapters and return the base model as it was."""
        remove(self.get_base_model())
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
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def _place(self, name: str, targets: list[str], config: LoraConfig) -> None:
        """Inject an adapter and note it."""
        check_adapter_name(name, self.peft_config)
        inject(self.get_base_model(), targets, config, name, widen=self.widen)
        self.peft_config[name] = config
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *targets]))

    def _load(self, name: str, config: LoraConfig, folder: Path) -> None:
        model = self.get_base_model()
        self._place(name, find_targets(model, config, every_entry=False), config)
        try:
            load_adapter_file(model, name, config, folder)
        except BaseException:
            remove_adapter(model, name)
            del self.peft_config[name]
            raise

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
    from rankfold.lora.tasks import model_class

    return model_class(peft_config)(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )


def read_config(folder: str | Path, is_trainable: bool) -> LoraConfig:
    """The config of an adapter folder.  Raises AdapterError."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    return config


def prepared(model: nn.Module, given: LoraConfig) -> tuple[list[str], LoraConfig]:
    """The targets of a new adapter and the model's own copy of its config, all of it checked."""
    targets = find_targets(model, given)
    check_targets({target: model.get_submodule(target) for target in targets})
    check_ranks(model, targets, given)
    config = dataclasses.replace(given, **_spelt_out(model, targets, given))
    base_name = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "name_or_path", None
    )
    config.base_model_name_or_path = config.base_model_name_or_path or base_name or None
    if config.task_type is None:
        kind = type(model)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return targets, config


def _spelt_out(model: nn.Module, targets: list[str], config: LoraConfig) -> dict[str, Any]:
    """``target_modules`` as names where the config left the choice to the model."""
    wanted = config.target_modules
    if wanted is None:
        usual = resolve(model, config)
        return {"target_modules": usual if isinstance(usual, str) else sorted(usual)}
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return {"target_modules": shortest_list(targets, module_names(model)), "exclude_modules": None}
    return {}


def refuse_adapted(model: nn.Module) -> None:
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ConfigError(
            "this model carries an adapter already; use add_adapter() or load_adapter() on the wrapped "
            "model, or merge_and_unload() or unload() it first"
        )


def check_adapter_name(name: str, taken: dict[str, LoraConfig]) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: a name has no dot and is not one of torch's own words"
        )
    if name in taken:
        raise ConfigError(f"the model has an adapter {name!r} already; delete_adapter() it first")
