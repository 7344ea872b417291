from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError
from rankfold.lora.layers.attention import LoraReadLinear
from rankfold.lora.layers.linear import LoraLinear


def passed_on(method):
    @functools.wraps(method)
    def wrapper(*args):
        return method(*args)

    return wrapper


class Reading(nn.Module):
    """Layers whose weights are read in its forward, in a decorated helper, in a function inside one, and one
    that is called, of which the dtype alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.helped, self.inner, self.called = (nn.Linear(4, 4) for _ in range(4))
        self.several = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.called.weight.dtype) @ self.read.weight.T
        return self.called(self.help(x) + x @ self.several[0].weight.T)

    @passed_on
    def help(self, x: torch.Tensor) -> torch.Tensor:
        def product() -> torch.Tensor:
            return x @ self.inner.weight.T

        return product() @ self.helped.weight


class Inheriting(Reading):
    pass


@pytest.mark.parametrize("kind", [Reading, Inheriting])
@pytest.mark.parametrize("place", ["read", "helped", "inner", "several.0", "called"])
def test_an_update_of_a_weight_that_is_read_counts_and_merges_to_the_same(kind, place):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    net = kind()
    before = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[place])).eval()
    wanted = LoraLinear if place == "called" else LoraReadLinear
    assert type(net.get_submodule(place)) is wanted
    torch.testing.assert_close(model(x), before)
    randomise(model)
    changed = model(x)
    assert not torch.allclose(changed, before, atol=1e-3)
    changed.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    torch.testing.assert_close(model.merge_and_unload()(x), changed, rtol=1e-4, atol=1e-5)


def test_a_bias_of_the_adapter_has_no_place_there():
    with pytest.raises(ConfigError, match="read from outside, where lora_bias has no place"):
        get_peft_model(Reading(), LoraConfig(r=2, target_modules=["read"], lora_bias=True))


@pytest.mark.parametrize("target", ["dt_proj", "x_proj", "out_proj", "in_proj"])
@pytest.mark.filterwarnings("ignore:the rank exceeds:UserWarning")
def test_mambas_projections_compute_what_the_merged_model_does(target):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2)
    base = MambaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[target])).eval()
    randomise(model)
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, adapted)
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
