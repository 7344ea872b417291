"""Query and key turned in one pass each, in models whose attention does it as Llama's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rankfold.models.running.rotary
from conftest import tiny_llama
from rankfold.kernels.rotary import rotary
from rankfold.models.running.rotary import fuse_rotary, rotary_like

IDS = torch.arange(3, 60).repeat(2, 2)


@pytest.fixture(autouse=True)
def every_size_is_fused(monkeypatch):
    monkeypatch.setattr(rankfold.models.running.rotary, "FUSED_FROM", 0)


def small(config, kind):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return kind(config(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def results(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_losses_and_gradients_are_those_of_the_separate_operations(family):
    plain = tiny_llama() if family == "llama" else small(Qwen3Config, Qwen3ForCausalLM)
    fused = copy.deepcopy(plain)
    assert fuse_rotary(fused) == rotary_like(plain) == plain.config.num_hidden_layers
    for ours, theirs in zip(results(fused), results(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_in_half_precision_the_loss_is_the_same_to_its_rounding():
    plain = tiny_llama().to(torch.bfloat16)
    fused = copy.deepcopy(plain)
    fuse_rotary(fused)
    assert abs(results(fused, autocast=True)[0] - results(plain, autocast=True)[0]) < 0.01


def test_a_family_that_turns_otherwise_keeps_its_own():
    model = small(CohereConfig, CohereForCausalLM)
    assert (fuse_rotary(model), rotary_like(model)) == (0, 2)


def test_no_other_model_and_no_function_of_transformers_changes():
    first, second = tiny_llama(), tiny_llama()
    own = type(first.model.layers[0].self_attn).forward
    fuse_rotary(first)
    assert fuse_rotary(first) == 0
    assert type(second.model.layers[0].self_attn).forward is own
    assert "forward" not in vars(second.model.layers[0].self_attn)


def test_a_copy_of_the_model_runs_its_own_layers():
    model = tiny_llama()
    fuse_rotary(model)
    twin = copy.deepcopy(model)
    layer = twin.model.layers[0].self_attn
    assert layer.forward.__self__ is layer


def test_the_gradient_is_that_of_small_differences():
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos[:, :1], sin[:, :1]), x.requires_grad_())


def test_the_angles_alone_are_kept():
    x = torch.randn(1, 4, 50, 8, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, 50, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        rotary(x, cos, sin)
    assert [tensor.data_ptr() for tensor in kept] == [cos.data_ptr(), sin.data_ptr()]
