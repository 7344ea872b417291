from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.lora.layers.inference_fast_path import LOOK
from rankfold.lora.layers.linear import LoraLinear


def adapted(**options) -> LoraLinear:
    net = nn.Sequential(nn.Linear(12, 9))
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **options))
    randomise(model)
    return net[0]


def by_formula(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    a, b = layer.factors("default")
    return nn.functional.linear(x, layer.weight + layer.scaling["default"] * b @ a, layer.bias)


def check(layer: LoraLinear, *shape: int) -> None:
    x = torch.randn(*(shape or (5, 12)), dtype=layer.weight.dtype)
    with torch.no_grad():
        for _ in range(2):  # the first call may look for the quick way, the second takes it
            torch.testing.assert_close(layer(x), by_formula(layer, x), rtol=1e-4, atol=1e-5)


def test_the_quick_way_is_taken_and_gives_what_the_long_way_gives():
    layer, x = adapted(), torch.randn(5, 12)
    check(layer)
    assert layer._quick is not LOOK
    assert layer._quick is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.unsqueeze(0))[0])
    torch.testing.assert_close(layer(x).detach(), by_formula(layer, x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 1, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)], ids=str)
def test_inputs_of_any_shape_take_it(shape, monkeypatch):
    layer = adapted()
    check(layer)
    monkeypatch.setattr(LoraLinear, "updated", None)  # the long way
    check(layer, *shape)


@pytest.mark.parametrize("alpha", [4, 7.5])
def test_the_scale_is_read_at_each_call(alpha):
    layer = adapted()
    check(layer)
    layer.scaling["default"] = alpha / 4
    check(layer)


def test_training_in_place_shows_at_once():
    layer = adapted()
    check(layer)
    with torch.no_grad():
        layer.factors("default")[1].add_(1.0)
    check(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_dtype_is_followed(dtype):
    layer = adapted()
    check(layer)
    layer.to(dtype)
    check(layer)


def test_memory_exchanged_behind_a_factor_is_followed():
    layer = adapted()
    check(layer)
    lora_a, lora_b = layer.factors("default")
    lora_a.data, lora_b.data = torch.randn(4, 12), torch.randn(9, 4)
    check(layer)
    lora_a.data, lora_b.data = lora_a.data[:2], lora_b.data[:, :2]  # the same memory, fewer ranks
    check(layer)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(2, 12))
    check(layer)


def test_a_copy_goes_its_own_way():
    layer = adapted()
    check(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.factors("default")[1].mul_(3)
    check(twin)
    check(layer)


def test_switching_off_merging_and_a_second_adapter_are_followed():
    net = nn.Sequential(nn.Linear(12, 9))
    config = LoraConfig(r=4, target_modules=["0"])
    model = get_peft_model(net, config)
    model.add_adapter("second", config)
    randomise(model)
    layer, x = net[0], torch.randn(5, 12)
    with torch.no_grad():
        first, base = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        with model.disable_adapter():
            assert torch.equal(layer(x), base)
        model.set_adapter("second")
        second = layer(x)
        model.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x), first + second - base)
        model.merge_adapter()
        torch.testing.assert_close(layer(x), first + second - base, rtol=1e-4, atol=1e-5)


def test_dropout_and_autocast_take_the_long_way():
    layer, x = adapted(lora_dropout=0.5), torch.randn(5, 12)
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        check(layer)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), by_formula(layer, x), rtol=0.05, atol=0.05)
