"""A base model with quantised weights: ready it for training, or turn it into an ordinary one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError, ModelError, bullet_list
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.packed import expand_layers
from rankfold.lora.layers.quantised import is_quantised, to_float
from rankfold.peft_surface import PeftModel
from rankfold.storage.layers import held_layers

# Methods whose half-precision parameters PEFT leaves as they are.
LEFT_ALONE = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Ready a quantised transformers model for an adapter, in place, and return it; as PEFT's function.

    Everything is frozen; what bitsandbytes left in half precision (norms, embeddings, head) becomes
    float32; activations are checkpointed, with the embeddings' output made to ask for gradients unless
    ``use_reentrant`` is False.  A model that is not quantised is frozen and widened only, as in PEFT."""
    method = "hqq" if getattr(model, "hqq_quantized", False) else getattr(model, "quantization_method", None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method not in LEFT_ALONE:
        widen(model)
    marks = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if use_gradient_checkpointing and (marks or method in LEFT_ALONE):
        checkpoint_activations(model, gradient_checkpointing_kwargs or {})
    return model


def widen(model: nn.Module) -> None:
    """Make every half-precision parameter float32, but for 4-bit weights stored as one."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()


def checkpoint_activations(model: Any, options: dict[str, Any]) -> None:
    """Switch activation checkpointing on, with gradients flowing through frozen embeddings."""
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    # transformers 5.23 has a new name, and warns at the old one.
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(options or None)  # an empty one would unset transformers' default, and torch warn of that


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every layer of ``model`` whose weight is held in few bytes (``load_base(.., stored=..)``) into a
    plain one, and every bitsandbytes or torchao linear layer into an ``nn.Linear``, in place.

    Adapters stay on, and can then be merged exactly.  ``dtype`` is that of the new weights; None means
    that of the model's other weights.  The model is then an ordinary one, for transformers too.

    Raises ModelError if there is no such layer, MergeError while an adapter is merged."""
    held = held_layers(model)
    layers = {path: layer for path, layer in model.named_modules() if is_quantised(layer)} | held
    if not layers:
        raise ModelError("no layer of this model is quantised by bitsandbytes or torchao, or held as blocks")
    merged = [path for path, layer in layers.items() if isinstance(layer, AdapterLayer) and layer.merged]
    if merged:
        raise MergeError(bullet_list("adapters are merged here; unmerge_adapter() first:", merged))
    dtype = dtype or _other_dtype(model, layers)
    for path in layers.keys() - held.keys():
        to_float(layers[path], dtype)
    expand_layers(held.values(), dtype)
    clear_quantisation_marks(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model


def _other_dtype(model: nn.Module, layers: dict[str, nn.Module]) -> torch.dtype:
    """The dtype of the first floating-point base parameter outside of ``layers``, else of their biases."""
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    own = [layer._parameters.get("bias") for layer in layers.values()]
    biases: list[Tensor] = [bias for bias in own if bias is not None]
    others = [p for p in model.parameters() if id(p) not in inside and p.is_floating_point()]
    return next((tensor.dtype for tensor in [*others, *biases]), torch.float32)


def clear_quantisation_marks(model: Any) -> None:
    """Take off the marks by which transformers knows a quantised model, which it would refuse to save."""
    model.hf_quantizer = None
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            setattr(model, mark, False)
    model.__dict__.pop("quantization_method", None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
