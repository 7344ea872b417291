"""PEFT's calls that gather what CorDA and LoRA-GA start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rankfold.errors import ConfigError, DataError
from rankfold.files import write_whole
from rankfold.lora.config.data_starts import CordaConfig
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.registry import base_modules
from rankfold.lora.placing.targets import find_targets, rank_of
from rankfold.lora.starts.corda import CordaEigens, eigens_of
from rankfold.lora.starts.moments import Inputs, Watch
from rankfold.lora.starts.parts import EIGENS, GRADIENT


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Give each target of ``model`` what CorDA starts it from, by the inputs that it gets while ``run_model``
    runs ``hooked_model`` (``model`` itself); ``get_peft_model`` then uses that up.

    ``covariance_file`` and ``cache_file`` of the config are safetensors files, read if they are there.  The
    covariances take (in, in) numbers of float32 for each different input.  Raises ConfigError."""
    config = lora_config.corda_config
    if not isinstance(config, CordaConfig):
        config = CordaConfig(**(config or {}))
    targets = linear_targets(model, lora_config)
    known = _cached(config.cache_file)
    if known is None:
        covariances, counts = _covariances(targets, lora_config, config, run_model, hooked_model or model)
        known = {}
        for name, layer in targets.items():
            rank, matrix = rank_of(name, lora_config), _matrix(layer)
            found = eigens_of(matrix, covariances[name], rank, config.corda_method)
            known |= {f"{name}.{EIGENS}.{key}": value.contiguous() for key, value in vars(found).items()}
            if not config.prune_temporary_fields:
                layer.__dict__.update(sample_count=counts.get(name, 0), covariance_matrix=covariances[name])
        _cache(config.cache_file, known)
    for name, layer in targets.items():
        fields = {key: known[f"{name}.{EIGENS}.{key}"] for key in ("S_WC", "U_WC", "V_WC")}
        layer.__dict__[EIGENS] = CordaEigens(**fields)


def _covariances(
    targets: Mapping[str, nn.Module],
    lora_config: LoraConfig,
    config: CordaConfig,
    run_model: Callable[[], Any] | None,
    hooked: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The mean over the forwards of each target's second moments (in, in), and how many forwards that are."""
    known = _cached(config.covariance_file)
    if known is not None:
        return {name: known[name] for name in targets}, {}
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    layers = {n: each for n, each in linear_targets(hooked, lora_config).items() if n in targets}
    inputs = Inputs(Watch(hooked, layers, _normalised))
    hooked.eval()
    with inputs.gathered():
        run_model()
    if missing := [name for name in targets if inputs.leader.get(name) not in inputs.moments]:
        raise ConfigError(f"these targets were given no input while the model ran: {', '.join(missing)}")
    found = {name: inputs[name].second / inputs[name].forwards for name in targets}
    _cache(config.covariance_file, {name: tensor.contiguous().clone() for name, tensor in found.items()})
    return found, {name: inputs[name].forwards for name in targets}


def _normalised(given: Tensor, name: str) -> Tensor:
    rows = given.reshape(-1, given.shape[-1]).float()
    rows = rows / rows.max().abs()
    if not torch.isfinite(rows).all():
        raise DataError(f"Invalid value found in input of {name}, please check your input data.")
    return rows


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | Path | None = None,
) -> None:
    """Give each target of ``model`` the mean gradient of its weight over the backwards of ``train_step``;
    ``get_peft_model`` then uses that up.  ``cache_file`` is a safetensors file, read if it is there.

    Nothing else has gradients meanwhile; they take the size of the targets' weights.  Raises ConfigError."""
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' "
            "and lora_ga_config=LoraGAConfig(...)."
        )
    targets = linear_targets(model, lora_config)
    if not targets:
        raise ConfigError(
            "No supported layers found for LoRA-GA initialization. LoRA-GA only supports nn.Linear and "
            "Conv1D layers."
        )
    if quantised := [name for name, layer in targets.items() if _is_quantised(layer)]:
        raise ConfigError(
            f"LoRA-GA does not support quantized models. Found quantized module: '{quantised[0]}'. LoRA-GA "
            "requires full-precision gradients during preprocessing."
        )
    known = _cached(cache_file)
    if known is None:
        known = {f"{name}.{GRADIENT}": g for name, g in _gradients(model, targets, train_step).items()}
        _cache(cache_file, known)
    for name, layer in targets.items():
        if f"{name}.{GRADIENT}" in known:
            layer.__dict__[GRADIENT] = known[f"{name}.{GRADIENT}"]


def _gradients(
    model: nn.Module, targets: Mapping[str, nn.Module], train_step: Callable[[], Any]
) -> dict[str, Tensor]:
    """The mean gradient of each target's weight, in its shape."""
    counts = dict.fromkeys(targets, 0)

    def counting(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            counts[name] += 1

        return hook

    weights = {name: layer._parameters["weight"] for name, layer in targets.items()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.train().requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        assert weight is not None
        handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(counting(name)))
    try:
        with torch.enable_grad():
            train_step()
        return {
            name: weight.grad.detach() / counts[name]
            for name, weight in weights.items()
            if weight is not None and weight.grad is not None
        }
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before:
            parameter.requires_grad, parameter.grad = required, None
        model.train(was_training)


def _is_quantised(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is None or not weight.is_floating_point() or hasattr(layer, "quant_state")


def _matrix(layer: nn.Module) -> Tensor:
    """The weight (out, in)."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.detach() if isinstance(layer, nn.Linear) else weight.detach().T


def _cached(file: str | Path | None) -> dict[str, Tensor] | None:
    return (
        load_file(file) if file is not None and Path(file).is_file() and Path(file).stat().st_size else None
    )


def _cache(file: str | Path | None, tensors: Mapping[str, Tensor]) -> None:
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(file), save(dict(tensors)))


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    modules = dict(base_modules(model))
    found = {name: modules[name] for name in find_targets(model, config, new=True)}
    return {
        name: layer
        for name, layer in found.items()
        if isinstance(layer, nn.Linear) or type(layer).__name__ in ("Conv1D", "LoraConv1D")
    }
