"""An adapter as llama.cpp reads it: a GGUF file of low-rank pairs (``llama_adapter_lora_init_impl`` in
src/llama-adapter.cpp)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankfold.errors import AdapterError, bullet_list
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.layers.embedding import LoraEmbedding
from rankfold.lora.layers.linear import LoraLinear
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.layers.saved import SavedModule
from rankfold.models.gguf.architectures import ARCHITECTURES
from rankfold.models.gguf.tensors import rows_in_pairs, rows_of_pairs, tensor_names, turned_heads
from rankfold.peft_surface import PeftModel

WORDS, HEAD = "token_embd.weight", "output.weight"
Array = np.ndarray[Any, Any]


def write_gguf_adapter(
    model: PeftModel, architecture: str, tensors: Collection[str], out: Path, same: Collection[str] = ()
) -> None:
    """Write the only adapter of ``model`` to ``out``, for a base that is GGUF's ``architecture`` and has
    these ``tensors``; parameters called ``same``, of which the adapter has a copy, are as the base's.

    The scale is in B, so that ranks and alphas may differ.  Raises AdapterError listing what llama.cpp has no
    place for: anything but pairs of linear layers and of an embedding that is no head too."""
    from gguf import GGUFWriter

    base = model.get_base_model()
    [adapter] = model.peft_config
    problems = [f"{path} is saved whole" for path in _whole(base, adapter) if path not in same]
    pairs: dict[str, tuple[Array, Array]] = {}
    for path, name, layer in _placed(base, architecture):
        why = _why_not(layer, name, tensors)
        if why:
            problems.append(f"{path}: {why}")
            continue
        lora_a, lora_b = (t.detach().float().cpu().numpy() for t in layer.factors(adapter))
        lora_b = lora_b * np.float32(layer.scaling[adapter])
        heads = turned_heads(name, ARCHITECTURES[architecture], base.config)
        pairs[name] = (
            lora_a.T if name == WORDS else lora_a,
            rows_in_pairs(lora_b, heads) if heads else lora_b,
        )
    if problems:
        text = "llama.cpp has no place for all of this adapter; merged into its base (--to gguf) it has:"
        raise AdapterError(bullet_list(text, problems))
    writer = GGUFWriter(str(out), architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # which means no scale but that in B
    if named := model.peft_config[adapter].base_model_name_or_path:
        writer.add_uint32("general.base_model.count", 1)
        writer.add_string("general.base_model.0.name", named)
    for name, both in pairs.items():
        for side, values in zip(("lora_a", "lora_b"), both, strict=True):
            writer.add_tensor(f"{name}.{side}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def take_gguf_adapter(model: PeftModel, architecture: str, file: Path) -> None:
    """Give the adapter of ``model`` the pairs that ``write_gguf_adapter`` wrote to ``file``."""
    from gguf import GGUFReader

    base = model.get_base_model()
    [adapter] = model.peft_config
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}
    for _, name, layer in _placed(base, architecture):
        heads = turned_heads(name, ARCHITECTURES[architecture], base.config)
        wide, narrow = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        values = wide.T if name == WORDS else wide, rows_of_pairs(narrow, heads) if heads else narrow
        lora_a, lora_b = layer.factors(adapter)
        lora_a.copy_(torch.from_numpy(values[0]))
        lora_b.copy_(torch.from_numpy(values[1]) / layer.scaling[adapter])


def _placed(base: Any, architecture: str) -> list[tuple[str, str, Any]]:
    """The adapted layers by their paths, each with the name that GGUF has for its weight, or none."""
    found: list[tuple[str, Any]] = [*adapter_layers(base)]
    layers = {f"{path}.weight": layer for path, layer in found if not isinstance(layer, HeldParameters)}
    names = tensor_names(architecture, base.config, layers)
    return [(key.removesuffix(".weight"), str(names[key] or ""), layer) for key, layer in layers.items()]


def _whole(base: Any, adapter: str) -> list[str]:
    """The parameters of which the adapter brings a value of its own."""
    held = [layer for _, layer in adapter_layers(base) if isinstance(layer, HeldParameters)]
    return [path for layer in held for each in layer.held[adapter] for path in each.paths]


def _why_not(layer: Any, name: str, tensors: Collection[str]) -> str:
    if isinstance(layer, SavedModule):
        return "it is saved whole (modules_to_save)"
    if type(layer) not in (LoraLinear, LoraEmbedding):
        return f"a {type(layer).__name__}"
    if any(spec.config.use_dora or spec.config.lora_bias for spec in layer.specs.values()):
        return "its pair has magnitudes (DoRA) or a bias"
    if any(not_plain(spec.config) for spec in layer.specs.values()):
        return "; ".join(text for spec in layer.specs.values() for text in not_plain(spec.config))
    if name == WORDS and HEAD not in tensors:
        return "the words are the head too, where llama.cpp would take the pair for another"
    return "" if name in tensors else "the base's file has no tensor of its own for it"
