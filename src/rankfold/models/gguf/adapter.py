"""An adapter as llama.cpp reads it: a GGUF file of low-rank pairs (``llama_adapter_lora_init_impl`` in
src/llama-adapter.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rankfold.errors import AdapterError, bullet_list
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.layers.linear import LoraLinear
from rankfold.lora.layers.registry import adapter_layers
from rankfold.models.gguf.architectures import ARCHITECTURES
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tensors import rows_in_pairs, tensor_places, turned_heads
from rankfold.peft_surface import PeftModel


def write_gguf_adapter(model: PeftModel, base_file: Path, out: Path) -> None:
    """Write the only adapter of ``model``, whose base is ``base_file``, to ``out``.

    The scale is in B, so that ranks and alphas may differ.  Raises AdapterError listing what llama.cpp has no
    place for: anything but pairs of linear layers."""
    from gguf import GGUFWriter

    file, base = read_gguf(base_file, words=False), model.get_base_model()
    [adapter] = model.peft_config
    names = {place: str(name) for name, place in tensor_places(file, base).items()}
    problems: list[str] = []
    pairs: dict[str, tuple[Any, Any]] = {}
    layers: list[tuple[str, Any]] = [*adapter_layers(base)]
    for path, layer in layers:
        name = names.get(f"{path}.weight", "")
        why = _why_not(layer, name in file.tensors)
        if why:
            problems.append(f"{path}: {why}")
            continue
        lora_a, lora_b = (t.detach().float().cpu().numpy() for t in layer.factors(adapter))
        pairs[name] = lora_a, lora_b * np.float32(layer.scaling[adapter])
    if problems:
        raise AdapterError(bullet_list("llama.cpp takes adapters of linear layers only:", problems))
    writer = GGUFWriter(str(out), file.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # which means no scale but that in B
    for name, (lora_a, lora_b) in pairs.items():
        heads = turned_heads(name, ARCHITECTURES[file.architecture], base.config)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(lora_a))
        writer.add_tensor(
            f"{name}.lora_b", np.ascontiguousarray(rows_in_pairs(lora_b, heads) if heads else lora_b)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _why_not(layer: Any, is_known: bool) -> str:
    if type(layer) is not LoraLinear:
        return f"a {type(layer).__name__}"
    if any(spec.config.use_dora or spec.config.lora_bias for spec in layer.specs.values()):
        return "its pair has magnitudes (DoRA) or a bias"
    if any(not_plain(spec.config) for spec in layer.specs.values()):
        return "; ".join(text for spec in layer.specs.values() for text in not_plain(spec.config))
    return "" if is_known else "the base's file has no tensor of its own for it"
