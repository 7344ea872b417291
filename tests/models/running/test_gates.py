"""SwiGLU blocks whose down projection takes gate and up apart."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

import rankfold.lora.layers.linear
from conftest import tiny_llama
from rankfold.lora import LoraConfig
from rankfold.models.running.gates import fuse_gates
from rankfold.peft_surface import get_peft_model
from rankfold.train.planning.recomputing import recompute_activations

IDS = torch.arange(3, 60).repeat(2, 20)[:, :1024]


@pytest.fixture(autouse=True)
def every_size_is_fused(monkeypatch):
    monkeypatch.setattr(rankfold.lora.layers.linear, "FUSED_FROM", 0)


def adapted(base=None, dtype=torch.float32, **options):
    """A tiny model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear"} | options
    model = get_peft_model(base or tiny_llama(), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def gradients(model, autocast=None):
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def kept_numbers(model) -> int:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_gives_the_same_bits_as_the_separate_operations(dtype, dropout):
    autocast = None if dtype == torch.float32 else dtype
    plain, fused = (gradients(adapted(dtype=dtype, lora_dropout=dropout), autocast), None)
    model = adapted(dtype=dtype, lora_dropout=dropout)
    assert fuse_gates(model) == model.config.num_hidden_layers
    fused = gradients(model, autocast)
    assert len(plain) == len(fused)
    assert all(map(torch.equal, plain, fused))


def test_two_tensors_a_block_are_kept_where_there_were_four():
    plain, fused = adapted(), adapted()
    fuse_gates(fused)
    config = plain.config
    block = IDS.numel() * config.intermediate_size
    assert kept_numbers(plain) - kept_numbers(fused) == 2 * block * config.num_hidden_layers


def test_a_block_whose_layers_are_computed_again_is_right_too():
    plain, fused = adapted(), adapted()
    fuse_gates(fused)
    recompute_activations(fused)
    assert all(map(torch.equal, gradients(plain), gradients(fused)))


def test_a_hook_on_the_down_projection_still_sees_its_input():
    model, seen = adapted(), []
    fuse_gates(model)
    down = model.get_base_model().model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    gradients(model)
    assert seen == [(*IDS.shape, model.config.intermediate_size)]


def test_a_copy_of_the_model_uses_its_own_weights():
    model = adapted()
    fuse_gates(model)
    other = copy.deepcopy(model)
    before = gradients(model)
    for weight in other.parameters():
        weight.data.zero_()
    model.zero_grad()
    assert all(map(torch.equal, before, gradients(model)))
    assert gradients(other)[0] != before[0]


def test_a_disabled_or_merged_adapter_is_as_without():
    plain, fused = adapted(), adapted()
    fuse_gates(fused)
    with plain.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        assert torch.equal(plain(IDS).logits, fused(IDS).logits)
    assert torch.equal(plain.merge_and_unload()(IDS).logits, fused.merge_and_unload()(IDS).logits)


def test_a_block_with_another_activation_is_left_alone():
    config = GemmaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    assert fuse_gates(adapted(GemmaForCausalLM(config))) == 0


def test_a_block_without_an_adapter_on_its_down_projection_is_left_alone():
    assert fuse_gates(adapted(target_modules=["q_proj", "v_proj"])) == 0
    assert fuse_gates(adapted(use_dora=True)) == 2  # the layer itself falls back
