"""bitsandbytes' 4-bit layers made from weights, on a CPU."""

from __future__ import annotations

import sys

import bitsandbytes
import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ModelError
from rankfold.lora.layers.packed import numbers_not_shown
from rankfold.models.base.four_bit import four_bit_sizes, require_bitsandbytes, to_four_bits
from rankfold.models.base.kbit import dequantise


def four_bit(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(128, 96, bias=bias)
    weight = layer.weight.detach().clone()
    to_four_bits(layer, weight, dtype)
    return layer.requires_grad_(False), weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_bitsandbytes_own_does(bias):
    layer, weight = four_bit(bias=bias)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    state = {"weight": weight} | ({"bias": layer.bias.detach()} if bias else {})
    theirs.load_state_dict(state)
    theirs = theirs.to("cpu")
    assert type(layer) is type(theirs)
    assert torch.equal(layer.weight.data, theirs.weight.data)
    x = torch.randn(5, 128)
    assert torch.equal(layer(x), theirs(x))


def test_a_layer_on_the_meta_device_takes_its_weight():
    with torch.device("meta"):
        layer = nn.Linear(128, 96, bias=False)
    to_four_bits(layer, torch.randn(96, 128), torch.bfloat16)
    assert layer(torch.randn(2, 128)).shape == (2, 96)


def test_gradients_flow_after_a_call_without_them():
    """bitsandbytes repacks the weight in such a call on some CPUs, and has no gradients from then on."""
    layer, weight = four_bit()
    layer.eval()
    with torch.no_grad():
        first = layer(torch.ones(1, 128))
    x = torch.ones(1, 128, requires_grad=True)
    layer(x).sum().backward()
    numbers = dequantise(nn.Sequential(four_bit()[0]))[0].weight
    torch.testing.assert_close(x.grad[0], numbers.sum(0), rtol=1e-4, atol=1e-5)
    assert (numbers - weight).norm() / weight.norm() < 0.15
    assert torch.equal(layer(torch.ones(1, 128)), first)


def test_an_adapter_sits_on_it_and_its_numbers_are_counted():
    model = nn.Sequential(four_bit(bias=False)[0], nn.Linear(96, 4))
    assert numbers_not_shown(model) == 96 * 128 // 2
    [size] = four_bit_sizes(model)
    assert 96 * 128 / 2 < size < 96 * 128  # half a byte each, and their scales
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    randomise(adapted)
    assert adapted.get_nb_trainable_parameters() == (4 * (96 + 128), 96 * 128 + 96 * 4 + 4 + 4 * (96 + 128))
    adapted(torch.randn(3, 128)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_" in n)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ModelError, match=r"stored='nf4' needs the package bitsandbytes \(pip install .*'q4_0'"
    ):
        require_bitsandbytes()
