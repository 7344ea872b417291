"""RMS norms of a model that is trained, as one function each."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rankfold.models.running.norms
from conftest import tiny_llama
from rankfold.models.running.norms import fuse_norms

IDS = torch.arange(3, 60).repeat(2, 2)


@pytest.fixture(autouse=True)
def every_size_is_fused(monkeypatch):
    monkeypatch.setattr(rankfold.models.running.norms, "FUSED_FROM", 0)


def small(kind):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    return (
        Qwen3ForCausalLM(Qwen3Config(**sizes)) if kind == "qwen3" else GemmaForCausalLM(GemmaConfig(**sizes))
    )


def with_frozen_norms(model):
    """Trained but for its norms, whose weights are not all one."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
            weight.requires_grad = False
    return model


def gradients(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_losses_and_gradients_are_those_of_the_separate_operations(kind):
    plain = with_frozen_norms(tiny_llama() if kind == "llama" else small(kind))
    fused = copy.deepcopy(plain)
    of_heads = 2 if kind == "qwen3" else 0
    assert fuse_norms(fused) == plain.config.num_hidden_layers * (2 + of_heads) + 1
    for ours, theirs in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_in_half_precision_the_loss_is_the_same_to_its_rounding():
    plain = with_frozen_norms(tiny_llama().to(torch.bfloat16))
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert abs(gradients(fused, autocast=True)[0] - gradients(plain, autocast=True)[0]) < 0.01


def test_half_of_what_a_norm_keeps_in_half_precision_is_saved():
    plain = with_frozen_norms(tiny_llama().to(torch.bfloat16))
    fused = copy.deepcopy(plain)
    norms = fuse_norms(fused)
    wide = IDS.numel() * plain.config.hidden_size * 4
    assert kept_bytes(plain, torch.float32) - kept_bytes(fused, torch.float32) >= norms * wide * 0.9


def kept_bytes(model, dtype) -> int:
    """The bytes of large tensors of ``dtype`` that a forward keeps."""
    kept = {}

    def pack(tensor):
        if tensor.dtype == dtype and tensor.numel() >= IDS.numel() * model.config.hidden_size:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize, tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=IDS, use_cache=False)
    return sum(size for size, _ in kept.values())


def test_a_norm_that_is_trained_gets_its_gradient():
    model = tiny_llama()
    fuse_norms(model)
    gradients(model)
    assert model.model.norm.weight.grad.abs().max() > 0


def test_a_copy_of_the_model_uses_its_own_weights():
    model = with_frozen_norms(tiny_llama())
    fuse_norms(model)
    other = copy.deepcopy(model)
    before = gradients(model)
    other.model.norm.weight.data.zero_()
    model.zero_grad()
    assert all(map(torch.equal, before, gradients(model)))
    assert gradients(other)[0] != before[0]


def test_a_norm_of_another_form_is_left_alone():
    assert fuse_norms(small("gemma")) == 0  # one plus the weight


def test_float64_is_left_to_the_separate_operations():
    plain = with_frozen_norms(tiny_llama().double())
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert all(map(torch.equal, gradients(plain), gradients(fused)))
