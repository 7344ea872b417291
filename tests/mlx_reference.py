"""How mlx-lm and mlx-vlm load an adapter, written down a second time on torch tensors.

Sources (as stored at the commits named; none of their code is here):
mlx-lm 0367286, ``mlx_lm/tuner/utils.py``: ``load_adapters`` reads ``adapter_config.json``, gives
``num_layers``, ``lora_parameters`` and ``fine_tune_type == "dora"`` to ``linear_to_lora_layers``, and loads
``adapters.safetensors`` by name.  ``linear_to_lora_layers`` turns into LoRA layers, in the last
``max(num_layers, 0)`` blocks (all of them for 0), the modules whose name inside the block is in ``keys``,
then every module of the model whose whole name is; linear layers and embeddings only.
mlx-lm 200af25, ``mlx_lm/tuner/lora.py``: ``y + scale * (x @ lora_a) @ lora_b`` with lora_a (in, rank) and
lora_b (rank, out); an embedding's rows are ``lora_a[ids] @ lora_b`` with lora_a (words, rank).
mlx-lm 35d46a9, ``mlx_lm/tuner/dora.py``: ``m / norm(W + scale * (lora_a @ lora_b).T) * (x W.T + update)``,
and the bias after that.
mlx-vlm 32abdcb, ``mlx_vlm/trainer/peft/utils.py``: ``_apply_lora_layers`` looks up each of ``keys`` as a
whole name in the model; only linear layers can be converted; ``rank``, ``scale`` and ``dropout`` must be
there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def converted(names: dict[str, nn.Module], config: dict, blocks: int) -> set[str]:
    """The modules that mlx-lm turns into LoRA layers; ``names`` are all, by mlx's names."""
    keys, last = set(config["lora_parameters"]["keys"]), max(config["num_layers"], 0)
    block_names = [f"model.layers.{n}." for n in range(blocks)][-last:]
    inside = {name for name in names for block in block_names if name.removeprefix(block) in keys}
    return {name for name in inside if name.startswith("model.layers.")} | (keys & names.keys())


def converted_by_vlm(names: dict[str, nn.Module], config: dict) -> set[str]:
    """The modules that mlx-vlm turns into LoRA layers."""
    keys = config["lora_parameters"]["keys"]
    assert all(isinstance(names[key], nn.Linear) for key in keys)  # else an error there
    return set(keys)


def load_like_mlx(names: dict[str, nn.Module], folder: Path, *, blocks: int = 0, vlm: bool = False) -> None:
    """Let the torch modules ``names`` compute what mlx would with the adapter in ``folder``."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] in ("lora", "dora")
    parameters = config["lora_parameters"]
    rank, scale = parameters["rank"], parameters["scale"]
    assert 0 <= parameters["dropout"] < 1
    tensors = load_file(folder / "adapters.safetensors")
    dora = config["fine_tune_type"] == "dora"
    modules = converted_by_vlm(names, config) if vlm else converted(names, config, blocks)
    wanted = {f"{m}.{key}" for m in modules for key in ("lora_a", "lora_b", *(["m"] if dora else []))}
    assert tensors.keys() == wanted  # nothing is left over or left at its start
    for name in modules:
        module, own = names[name], {key: tensors[f"{name}.{key}"] for key in ("lora_a", "lora_b")}
        out, columns = module.weight.shape
        wide = columns if isinstance(module, nn.Linear) else out
        narrow = out if isinstance(module, nn.Linear) else columns
        assert own["lora_a"].shape == (wide, rank)
        assert own["lora_b"].shape == (rank, narrow)
        m = tensors.get(f"{name}.m")
        assert m is None or m.shape == (out,)
        module.forward = _forward(module, own["lora_a"], own["lora_b"], scale, m)


def _forward(module: nn.Module, a: Tensor, b: Tensor, scale: float, m: Tensor | None):
    base = module.forward

    def plain(x: Tensor) -> Tensor:
        return base(x) + scale * ((x @ a) @ b if isinstance(module, nn.Linear) else a[x] @ b)

    def dora(x: Tensor) -> Tensor:
        out = x @ module.weight.T + scale * (x @ a) @ b
        norms = torch.linalg.vector_norm(module.weight + scale * (a @ b).T, dim=1)
        out = m / norms * out
        return out if module.bias is None else out + module.bias

    return plain if m is None else dora
