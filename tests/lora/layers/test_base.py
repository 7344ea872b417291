from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import MergeError
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.layers.linear import LoraLinear
from rankfold.lora.layers.registry import adapt, restore


def adapted(layer: nn.Linear, **options) -> LoraLinear:
    lora = adapt(layer)
    config = LoraConfig(r=4, lora_alpha=8, **options)
    lora.add_adapter(AdapterSpec("default", "layer", config.r, config.lora_alpha, config))
    lora.set_adapter(["default"])
    randomise(lora)
    return lora


def test_the_layer_stays_the_same_object_and_a_linear():
    layer = nn.Linear(6, 5)
    weight, calls = layer.weight, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    lora = adapted(layer)
    assert lora is layer
    assert isinstance(lora, nn.Linear)
    assert lora.weight is weight
    lora(torch.randn(2, 6))
    assert calls == [1]


def test_a_dropout_is_a_module_of_the_layer_by_name_as_in_peft():
    lora = adapted(nn.Linear(6, 5))
    assert list(lora.lora_dropout) == ["default"]
    assert type(lora.lora_dropout["default"]) is nn.Identity
    config = LoraConfig(r=4, lora_dropout=0.5)
    lora.add_adapter(AdapterSpec("second", "layer", config.r, config.lora_alpha, config))
    assert {name: type(held) for name, held in dict(lora.named_children())["lora_dropout"].items()} == {
        "default": nn.Identity,
        "second": nn.Dropout,
    }
    assert lora.lora_dropout["second"].p == 0.5
    lora.delete_adapter("second")
    assert list(lora.lora_dropout) == ["default"]


def test_keys_are_added_and_none_renamed():
    layer = nn.Linear(6, 5)
    before = list(layer.state_dict())
    after = list(adapted(layer).state_dict())
    assert after[: len(before)] == before
    assert after[len(before) :] == ["lora_A.default.weight", "lora_B.default.weight"]


def test_the_output_is_the_dense_formula():
    layer = nn.Linear(6, 5).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    lora = adapted(layer)
    a, b = lora.factors("default")
    torch.testing.assert_close(lora(x), x @ (layer.weight + 2.0 * b @ a).T + layer.bias)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_start_is_the_base_to_the_last_bit(init):
    layer = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    expected = layer(x)
    lora = adapt(layer)
    lora.add_adapter(AdapterSpec("default", "layer", 4, 8, LoraConfig(init_lora_weights=init)))
    lora.set_adapter(["default"])
    assert torch.equal(lora(x), expected)
    assert lora.factors("default")[0].abs().sum() > 0


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.peft("one seed: the values at the start", "same", "same")
def test_one_seed_gives_the_same_start_as_peft(init):
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9))
    theirs = copy.deepcopy(net)
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": init}
    torch.manual_seed(7)
    get_peft_model(net, LoraConfig(**options))
    torch.manual_seed(7)
    peft.get_peft_model(theirs, peft.LoraConfig(**options))
    for place in (0, 2):
        for factor in ("lora_A", "lora_B"):
            ours = getattr(net[place], factor)["default"].weight
            assert torch.equal(ours, getattr(theirs[place], factor)["default"].weight)


def test_restoring_gives_back_a_plain_linear():
    layer = nn.Linear(6, 5)
    x, state = torch.randn(2, 6), copy.deepcopy(layer.state_dict())
    expected = layer(x)
    restore(adapted(layer))
    assert type(layer) is nn.Linear
    assert layer.state_dict().keys() == state.keys()
    assert vars(layer).keys() == vars(nn.Linear(6, 5)).keys()
    assert torch.equal(layer(x), expected)


def test_dropout_falls_on_the_update_only_and_in_training_only():
    lora = adapted(nn.Linear(64, 5), lora_dropout=0.5)
    x = torch.randn(3, 64)
    lora.train()
    assert not torch.equal(lora(x), lora(x))
    lora.enable_adapters(False)
    assert torch.equal(lora(x), nn.functional.linear(x, lora.weight, lora.bias))
    lora.enable_adapters(True)
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_a_half_precision_base_gets_float32_factors_and_keeps_its_output_dtype():
    lora = adapted(nn.Linear(6, 5).bfloat16())
    assert lora.factors("default")[0].dtype == torch.float32
    assert lora(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


def test_a_merge_that_overflows_is_refused_with_its_size():
    lora = adapted(nn.Linear(6, 5).half())
    with torch.no_grad():
        lora.factors("default")[1].fill_(1e6)
    with pytest.raises(MergeError, match=r"the largest magnitude is \d.* in torch.float16"):
        lora.merged_values(["default"])


def test_the_print_shows_rank_alpha_and_scale():
    assert "adapters=[default: rank=4 alpha=8 scale=2]" in repr(adapted(nn.Linear(6, 5)))


def test_a_copy_is_independent():
    lora = adapted(nn.Linear(6, 5))
    twin = copy.deepcopy(lora)
    with torch.no_grad():
        twin.factors("default")[1].zero_()
    assert lora.factors("default")[1].abs().sum() > 0
    assert type(twin) is LoraLinear
