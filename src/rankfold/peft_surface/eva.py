"""PEFT's calls for EVA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, DataError, RankfoldWarning
from rankfold.lora.config.data_starts import EvaConfig
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.linear import LinearUpdates
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.placing.targets import alpha_of, rank_of
from rankfold.lora.starts.eva import eva_start
from rankfold.lora.starts.moments import Watch
from rankfold.peft_surface.gathering import linear_targets

MODEL_PREFIX = "base_model.model."
LayerInputs = Callable[[Any, Any, str], Tensor]


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The places (count, 2) of the tokens that EVA looks at: no padding, and with ``use_label_mask`` none
    without a label."""
    if not isinstance(model_input, Mapping):
        raise ConfigError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary"
        )
    ids, config = model_input["input_ids"], peft_config.eva_config
    mask = model_input.get("attention_mask", torch.ones_like(ids)).bool()
    assert isinstance(config, EvaConfig)
    if config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != config.label_mask_value)
    places: Tensor = mask.nonzero()
    return places


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """The rows (count, in) of a layer's input at the places ``model_input``."""
    given = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(given, Tensor):
        raise ConfigError(
            f"unsupported input type {type(given)} for prepare_layer_inputs_fn in layer {layer_name}, please "
            "provide a custom prepare_layer_inputs_fn"
        )
    rows: Tensor = given[tuple(model_input.T)]
    return rows


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    given: Tensor = layer_input[0]
    return given.reshape(-1, given.shape[-1])


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = False,
) -> dict[str, Tensor]:
    """A (rank, in) for each target of EVA by its name in ``model``; the ranks are redistributed.

    The rows of ``dataloader`` are read until the directions no longer turn, once at most.
    ``gather_distributed_inputs`` and ``show_progress_bar`` are PEFT's words: each process reads its own rows.
    Raises ConfigError without a config, DataError without rows."""
    known = getattr(model, "peft_config", None)
    config = peft_config or (known[adapter_name] if known else None)
    if config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise DataError("dataloader is empty")
    layers = _eva_layers(model, config, adapter_name if known else None)
    own_fn = prepare_layer_inputs_fn or _all_rows
    if isinstance(own_fn, Mapping) and (unknown := own_fn.keys() - layers.keys()):
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the "
            f"model: {sorted(unknown)}"
        )
    place: list[Any] = [None]

    def take(given: Tensor, name: str) -> Tensor:
        fn = own_fn.get(name, _all_rows) if isinstance(own_fn, Mapping) else own_fn
        return fn((given,), place[0], name)

    def forwards() -> Iterator[None]:
        for batch in dataloader:
            inputs = _moved(batch, model)
            place[0] = inputs if prepare_model_inputs_fn is None else prepare_model_inputs_fn(inputs, config)
            forward_fn(model, inputs)
            yield

    watch = Watch(model, layers, take, shares=not isinstance(own_fn, Mapping))
    ranks = {name: rank_of(name.removeprefix(MODEL_PREFIX), config) for name in layers}
    eva = config.eva_config if isinstance(config.eva_config, EvaConfig) else EvaConfig()
    with _evaluating(model, disabled=bool(known)):
        return eva_start(watch, forwards, ranks, eva)


def _eva_layers(model: nn.Module, config: LoraConfig, adapter: str | None) -> dict[str, nn.Module]:
    """The linear layers that an adapter is on, or would be, by their names in ``model``."""
    if adapter is not None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        start = MODEL_PREFIX if inner is not model else ""
        return {
            f"{start}{path}": layer
            for path, layer in adapter_layers(inner)
            if isinstance(layer, LinearUpdates) and adapter in layer.r
        }
    return linear_targets(model, config)


def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    **how: Any,
) -> None:
    """Start the adapter by EVA: from ``eva_state_dict``, or from what ``get_eva_state_dict`` finds in
    ``dataloader``, whose options ``how`` are.

    A layer that gets no rank loses its adapter.  The adapter is put in place anew, so this comes before an
    optimiser is made.  Raises ConfigError if the config does not say "eva"."""
    config = _checked(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(model, dataloader, adapter_name=adapter_name, **how)
    found = {name.removeprefix(MODEL_PREFIX): rows for name, rows in eva_state_dict.items()}
    tuner = model.base_model
    carrying = [p for p, each in adapter_layers(tuner.model) if adapter_name in each.adapter_names()]
    layers = [path for path in carrying if isinstance(tuner.model.get_submodule(path), LinearUpdates)]
    tuner.replace(adapter_name, redistributed(config, layers, {n: len(rows) for n, rows in found.items()}))
    with torch.no_grad():
        for path, layer in adapter_layers(tuner.model):
            if path in found and isinstance(layer, LinearUpdates) and adapter_name in layer.r:
                layer.factors(adapter_name)[0].copy_(found[path])
    if missing := [path for path in layers if path not in found]:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found "
            f"in the eva state_dict: {missing}",
            RankfoldWarning,
            stacklevel=2,
        )


def _checked(model: Any, name: str) -> LoraConfig:
    if not hasattr(model, "peft_config"):
        raise ConfigError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config: LoraConfig = model.peft_config[name]
    if config.init_lora_weights != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    return config


def redistributed(config: LoraConfig, layers: Iterable[str], ranks: Mapping[str, int]) -> LoraConfig:
    """``config`` for the ``ranks`` of its ``layers``; one of rank 0 is a target no more.  Others keep their
    rank, and with ``adjust_scaling_factors`` all keep their scale."""
    eva = config.eva_config if isinstance(config.eva_config, EvaConfig) else EvaConfig()
    rank_pattern, alpha_pattern = {}, {}
    kept = [path for path in layers if ranks.get(path, 1)]
    for path in kept:
        rank, alpha = rank_of(path, config), alpha_of(path, config)
        new = ranks.get(path, rank)
        if eva.adjust_scaling_factors and new != rank:
            alpha *= new / rank
        if new != config.r:
            rank_pattern[path] = new
        if alpha != config.lora_alpha:
            alpha_pattern[path] = alpha
    return config.replaced(target_modules=kept, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def _moved(batch: Any, model: nn.Module) -> Any:
    """``batch`` on the device of ``model``."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    if isinstance(batch, Mapping):
        return {key: _moved(value, model) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, model) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


@contextmanager
def _evaluating(model: Any, *, disabled: bool) -> Iterator[None]:
    """Within the block ``model`` computes as in an evaluation, without its adapters if it has some."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if disabled else nullcontext():
            yield
    finally:
        model.train(was_training)
