"""Layers whose object holds a ``forward`` of its own, past which a class change would not get."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError

CONFIG = {"r": 4, "target_modules": ["0"]}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(3))


def net(*, hooked: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    if hooked:
        add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


@pytest.mark.peft("layers with accelerate's hooks (`device_map`)", "same", "same")
def test_the_adapter_counts_under_the_hooks_of_accelerate(x):
    ours = get_peft_model(net(hooked=True), LoraConfig(**CONFIG))
    theirs = peft.get_peft_model(net(hooked=True), peft.LoraConfig(**CONFIG))
    for model in (ours, theirs):
        randomise(model)
    torch.testing.assert_close(ours(x), theirs(x))
    with ours.disable_adapter():
        assert torch.equal(ours(x), net(hooked=False)(x))
    assert not torch.allclose(ours(x), net(hooked=False)(x))


def test_the_hooks_may_come_and_go_before_and_after_adapting(x):
    plain = get_peft_model(net(hooked=False), LoraConfig(**CONFIG))
    randomise(plain)
    base = net(hooked=True)
    remove_hook_from_module(base[0])
    model = get_peft_model(base, LoraConfig(**CONFIG))
    randomise(model)
    assert torch.equal(model(x), plain(x))
    add_hook_to_module(base[0], AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(model(x), plain(x))
    remove_hook_from_module(base[0])
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.unload()(x), net(hooked=False)(x))
    assert type(base[0]) is nn.Linear


def test_a_layer_whose_forward_somebody_replaced_is_refused(x):
    model = net(hooked=False)
    model[0].forward = lambda rows: rows[:, :6]
    with pytest.raises(ConfigError, match="0: its forward was replaced on the object itself"):
        get_peft_model(model, LoraConfig(**CONFIG))
    assert type(model[0]) is nn.Linear
