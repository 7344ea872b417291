"""What vLLM and lmdeploy ask of an adapter's files, written down a second time from their loaders.

Read, not run: each function says what it was written from, by repository, file and the commit as stored.
They take a folder as PEFT writes one, and raise AssertionError where the engine raises or would go wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

PREFIX = "base_model.model."


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def vllm_names(tensors: Collection[str], mapper: dict[str, str]) -> dict[str, str]:
    """The module that each tensor is for.

    vllm-project/vllm, vllm/lora/utils.py (``parse_fine_tuned_lora_name``): the prefix is taken off, the
    model's ``hf_to_vllm_mapper`` renames the beginning, and the rest must end in lora_A.weight,
    lora_B.weight, lora_embedding_A or lora_embedding_B."""
    found = {}
    for key in tensors:
        name = key.removeprefix(PREFIX)
        old = next((old for old in mapper if name.startswith(old)), "")
        name = mapper[old] + name.removeprefix(old) if old else name
        for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if name.endswith(ending):
                found[key] = name.removesuffix(ending)
        assert key in found, f"{key} is unsupported LoRA weight"
    return found


def check_vllm(folder: Path, modules: Collection[str], mapper: dict[str, str], max_rank: int) -> None:
    """``modules``: the linear modules that vLLM puts LoRA on, parts of packed ones by their own names.

    vllm/lora/peft_helper.py at 0214369: r, lora_alpha and target_modules must be there; modules_to_save and
    DoRA are refused; the scale of every module is lora_alpha / r, or / sqrt(r) with use_rslora, and no other
    field is read, so a pattern may only repeat what that gives.  vllm/lora/lora_model.py at 0306474: the last
    part of each module's name must be one that the model has.  A tensor of another rank than r is taken as it
    is, up to max_lora_rank (vllm/lora/layers: the memory is allocated for that many)."""
    config, tensors = read(folder)
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config.get("modules_to_save"), "vLLM only supports modules_to_save being None."
    assert not config.get("use_dora"), "vLLM does not yet support DoRA."
    assert config.get("bias", "none") == "none"
    assert config["r"] <= max_rank
    names = vllm_names(tensors, mapper)
    assert set(names.values()) <= set(modules), "these would be passed over without a word"
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for key, name in names.items():
        if key.endswith("lora_A.weight"):
            assert len(tensors[key]) <= max_rank
            assert math.isclose(peft_scale(config, key, tensors), scale), f"{name} would have another scale"


def check_lmdeploy(folder: Path, modules: Collection[str]) -> None:
    """``modules``: the linear modules of the part of the model whose parameters the loader looks through, by
    their names there, parts of packed ones by their own.

    InternLM/lmdeploy, lmdeploy/pytorch/adapter/adapter.py (``get_ranks_and_scalings``, ``find_all_target``,
    ``load_lora_weights``) and models/patch.py (``add_adapters``): target_modules is a list, and each entry
    is the last part of a module's name, because what is loaded is looked up under that; every entry has rank
    r and scale lora_alpha / r, and no other field is read; keys end in lora_A.weight or lora_B.weight."""
    config, tensors = read(folder)
    targets = config["target_modules"]
    assert isinstance(targets, list), "a pattern is taken for the set of its letters"
    assert all("." not in target for target in targets)
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("use_rslora")
    for key, tensor in tensors.items():
        assert key.startswith(PREFIX)
        path, factor, weight = key.removeprefix(PREFIX).rsplit(".", 2)
        assert weight == "weight"
        assert factor in ("lora_A", "lora_B")
        assert path in modules, f"KeyError: {path}"
        assert path.rpartition(".")[2] in targets
        assert tensor.shape[factor == "lora_B"] == config["r"]
        assert math.isclose(peft_scale(config, key, tensors), config["lora_alpha"] / config["r"])


def lmdeploy_wqkv(rows: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of ``wqkv``'s lora_B as queries, keys and values.  lmdeploy/pytorch/models/internlm2.py at
    011536f, ``InternLM2ForCausalLM.load_lora_weights``."""
    grouped = rows.view(kv_heads, 2 + heads // kv_heads, head_dim, -1)
    return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def peft_scale(config: dict, key: str, tensors: dict[str, Tensor]) -> float:
    """The scale that PEFT gives the pair of ``key``, patterns and all."""
    path = key.removeprefix(PREFIX).rsplit(".", 2)[0]
    endings = [path.split(".", n)[-1] for n in range(path.count(".") + 1)]
    pattern = config.get("alpha_pattern") or {}
    alpha = next((pattern[e] for e in endings if e in pattern), config["lora_alpha"])
    rank = len(tensors[key.replace("lora_B", "lora_A")])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
