"""``get_peft_model`` and the wrapped model, with the calls of PEFT's ``PeftModel``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from rankfold.compat import recomputes_activations
from rankfold.errors import ConfigError, nearest
from rankfold.lora.config.lora_config import LoraConfig, PeftType
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, LoadOptions, LoadResult
from rankfold.peft_surface.activated import get_alora_offsets_for_forward, get_alora_offsets_for_generate
from rankfold.peft_surface.card import push_to_hub, write_card
from rankfold.peft_surface.findings import (
    count_parameters,
    read_config,
    warn_of_changed_buffers,
    warn_of_name,
)
from rankfold.peft_surface.saving_and_loading import load_onto, save_from
from rankfold.peft_surface.stand_in import class_seen, recognise
from rankfold.peft_surface.tuner import LoraModel


class PeftModel(nn.Module):
    """A model whose chosen layers carry named LoRA adapters; everything else is frozen.

    The layers are adapted in place: the model passed in is the one inside (``get_base_model``).
    Attributes that are not found here are looked up on ``LoraModel``, which merges and unloads, and then on
    that model."""

    # transformers' Trainer asks this before it trains a quantised model: adapters are on it.
    _hf_peft_config_loaded = True
    _is_prompt_learning = False
    peft_type = PeftType.LORA
    special_peft_forward_args = frozenset({"adapter_names", "alora_offsets"})

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        source: AdapterSource | None = None,
    ) -> None:
        """Wrap ``model`` with a fresh adapter, or with the one in ``source``, whose config is given.
        ``low_cpu_mem_usage`` puts a fresh one on the meta device."""
        super().__init__()
        warn_of_name(adapter_name)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._adapters_disabled = False
        self.base_model = LoraModel(
            inner,
            peft_config,
            adapter_name,
            low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            source=source,
        )
        if recomputes_activations(inner):
            self.prepare_model_for_gradient_checkpointing(inner)
        recognise(type(self))

    @property
    def __class__(self) -> type:
        """What ``isinstance`` is told: this class, and PEFT's of the same name where that library is in
        use."""
        return class_seen(type(self), self.__dict__.get("_modules", {}).get("base_model"))

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__setattr__(self, "__class__", kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self),), self.__getstate__()  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        try:
            return getattr(self.base_model, name)
        except AttributeError as error:
            own = nearest(name, {word for word in (*dir(PeftModel), *dir(LoraModel)) if word[0] != "_"})
            inner = type(self.get_base_model()).__name__
            raise AttributeError(
                f"neither the PeftModel nor the {inner} inside has an attribute {name!r}{own}"
            ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= get_alora_offsets_for_forward(self, **kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **without_names(kwargs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, under the ``generation_config`` that was set on the wrapper,
        if any."""
        own = self.__dict__.get("generation_config")
        if own is not None:
            kwargs.setdefault("generation_config", own)
        kwargs = get_alora_offsets_for_generate(self, *args, **kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **without_names(kwargs))  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The model inside, its layers adapted."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, configs: dict[str, LoraConfig]) -> None:
        self.base_model.peft_config = configs

    @property
    def adapter_metadata(self) -> dict[str, AdapterMetadata]:
        return self.base_model.adapter_metadata

    @property
    def targeted_module_names(self) -> list[str]:
        return self.base_model.targeted_module_names

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the adapters name in ``modules_to_save``, or None if they name nothing."""
        return {n for config in self.peft_config.values() for n in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter beside the others, not active yet.

        Raises ConfigError if the name is taken, TargetError if nothing matches; nothing is changed then."""
        if adapter_name in self.peft_config:
            raise ConfigError(f"Adapter with name '{adapter_name}' already exists. delete_adapter() it first")
        warn_of_name(adapter_name)
        widen = self.base_model.widen and autocast_adapter_dtype
        self.base_model.add(adapter_name, peft_config, without_memory=low_cpu_mem_usage, widen=widen)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **options: Unpack[LoadOptions],
    ) -> LoadResult:
        """Load an adapter folder beside the others, not active yet, or into an adapter of this name that is
        there already; ``options`` are LoadOptions.  With ``is_trainable`` it is trained.

        Raises AdapterError listing all that does not fit; the model is then as it was."""
        source, tuner = AdapterSource.of(model_id, options), self.base_model
        config = read_config(source, is_trainable)
        if adapter_name in self.peft_config:
            result = load_onto(tuner, adapter_name, config, source)
        else:
            loaded = tuner.add(adapter_name, config, source=source, widen=autocast_adapter_dtype)
            result = loaded if loaded is not None else LoadResult([], [])
        if is_trainable:
            tuner.set_requires_grad(adapter_name)
        else:
            self.eval()
        return result

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose updates are added, the active ones, trained unless
        ``inference_mode``."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter.  Raises MergeError while it is merged."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Train, or do not train, the tensors of the named adapters, active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Unpack[LoadOptions],
    ) -> PeftModel:
        """Load an adapter folder, or a repository of the hub (written by rankfold or PEFT), onto ``model``;
        ``options`` are LoadOptions.  A ``config`` takes the place of the one in the folder.

        What does not fit and is not allowed is raised as an AdapterError listing all of it, and ``model`` is
        then as it was; what is allowed is told in one warning."""
        from rankfold.peft_surface.tasks import model_class

        source = AdapterSource.of(model_id, options)
        if config is None:
            config = read_config(source, is_trainable)
        config.inference_mode = not is_trainable
        loaded = model_class(config)(
            model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, source=source
        )
        return loaded.train(is_trainable)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, readable by PEFT, and a model
        card: the adapter "default" into the folder itself, any other into a folder of its name inside it.

        With ``path_initial_model_for_weight_conversion``, the folder of the adapter as saved before it was
        trained, an adapter whose start changed the base weights (pissa, olora) is written as a plain one
        of twice the rank, which makes the tuned model of the base as it was.

        ``rankfold.json`` beside them holds what lets a later load tell that all is as it was; ``facts``
        are fields of AdapterMetadata to put into it, such as ``base``, the base's fingerprint, where it is
        known because the base has been cut among processes since.  The file is always one, and always
        safetensors: ``safe_serialization=False`` is told, and not done."""
        if not safe_serialization:
            warnings.warn(
                "safe_serialization=False: pickled files are not written; saved as safetensors", stacklevel=2
            )
        if Path(save_directory).is_file():
            raise ConfigError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ConfigError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {unknown}."
            )
        if not is_main_process:
            return
        if state_dict is None and "state_dict" in vars(self):  # exchanged on the object, as some trainers do
            state_dict = self.state_dict()
        warn_of_changed_buffers(self.base_model.buffer_versions, self.get_base_model())
        initial = path_initial_model_for_weight_conversion
        save_from(
            self.base_model,
            names,
            Path(save_directory),
            save_embeddings=save_embedding_layers,
            initial=None if initial is None else Path(initial),
            facts=facts or {},
            values=state_dict,
        )
        self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write ``README.md`` with what the hub reads of an adapter; what stands there already is kept."""
        write_card(Path(output_dir), self.get_base_model(), causal=type(self).__name__.endswith("CausalLM"))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save into a repository of the hub; ``options`` are words of ``HfApi.create_repo`` and
        ``save_pretrained``."""
        return push_to_hub(self, repo_id, **options)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base computes, merged adapters included."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self.base_model.disabled():
                yield
        finally:
            self._adapters_disabled = before

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let the embeddings' output need gradients: recomputed blocks get none to hand on otherwise."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_need_gradients)  # type: ignore[operator]
        return model

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are in all, tied ones counted once."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[Any]:
        from rankfold.peft_surface import status

        return status.get_layer_status(self)

    def get_model_status(self) -> Any:
        from rankfold.peft_surface import status

        return status.get_model_status(self)


def _need_gradients(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call without those that are for the adapters."""
    return {key: value for key, value in kwargs.items() if key not in PeftModel.special_peft_forward_args}


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt the layers that ``peft_config`` names, in place, and wrap the model.

    The output is unchanged at first, to the last bit, because every lora_B starts at zero (unless
    ``init_lora_weights`` says otherwise).  The given config is copied, not changed; the copy's
    ``target_modules`` lists what was found.  ``mixed`` is PEFT's word for several methods, of which there is
    one here.

    Raises TargetError if nothing matches or a match is no supported layer, ConfigError for what a layer
    cannot carry."""
    from rankfold.peft_surface.tasks import PeftMixedModel, model_class

    if isinstance(model, PeftModel) or vars(model).get("peft_config"):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model "
            "with a different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if revision is not None and peft_config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {peft_config.revision}, overwriting with "
            f"revision {revision}",
            stacklevel=2,
        )
    if revision is not None:
        peft_config = dataclasses.replace(peft_config, revision=revision)
    kind = PeftMixedModel if mixed else model_class(peft_config)
    return kind(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
