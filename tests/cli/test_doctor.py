"""``rankfold doctor``"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import randomise
from rankfold import LoraConfig, get_peft_model


def test_it_prints_who_can_use_an_adapter_and_mends_it(command, tiny_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    status, printed, _ = command("doctor", tmp_path / "adapter")
    assert status == 0
    assert "modules  2 have a pair here" in printed
    assert "  vllm       yes" in printed
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"module.{key}": tensor for key, tensor in load_file(file).items()}, file)
    (tmp_path / "adapter" / "rankfold.json").unlink()
    status, printed, _ = command("doctor", tmp_path / "adapter", "--repair", tmp_path / "mended")
    assert status == 0
    assert "4 tensors get PEFT's names" in printed
    status, printed, _ = command("doctor", tmp_path / "mended", "--json")
    assert json.loads(printed)["mended"] == []
    save_file({"lora_A": torch.ones(2)}, file)
    status, printed, _ = command("doctor", tmp_path / "adapter")
    assert status == 1
    assert "1 of 1 tensors belong to no module" in printed
    status, _, told = command("doctor", tmp_path / "nowhere")
    assert (status, "nowhere" in told) == (2, True)
