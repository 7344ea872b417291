"""What starts hold while they look at rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.errors import ConfigError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.starts.moments import Inputs, Watch
from rankfold.models.base.load import load_base
from rankfold.peft_surface.gathering import linear_targets
from rankfold.train.planning import start_memory
from rankfold.train.planning.start_memory import check_room, gathered_bytes, told_gathered

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_base(str(tiny_folder)).model.float().eval()


@pytest.fixture(scope="module")
def layers(model):
    return linear_targets(model, LoraConfig(target_modules="all-linear"))


def test_it_is_no_more_than_what_the_moments_take_and_not_much_less(model, layers):
    inputs = Inputs(Watch(model, layers, lambda given, _: given.flatten(0, 1)))
    with inputs.gathered(), torch.no_grad():
        model(input_ids=IDS)
    held = sum(each.second.numel() * each.second.element_size() for each in inputs.moments.values())
    assert 0.5 * held < gathered_bytes("corda", layers) <= held


def test_gradients_are_as_large_as_the_weights(layers):
    assert gathered_bytes("lora-ga", layers) == sum(4 * layer.weight.numel() for layer in layers.values())
    assert gathered_bytes("pissa", layers) == 0
    assert told_gathered("plain", layers) == []


def test_what_cannot_fit_is_refused_before_it_is_tried(monkeypatch):
    layers = {"block.wide": nn.Linear(100_000, 4, device="meta")}
    monkeypatch.setattr(start_memory, "free_swap_bytes", lambda _: 0)
    monkeypatch.setattr(start_memory, "free_memory_bytes", lambda _: 39_000_000_000)
    with pytest.raises(ConfigError, match=r"start=corda holds at least 40.0 GB .* and 39.0 GB are free"):
        check_room("corda", layers, "cpu")
    check_room("eva", layers, "cpu")
    assert told_gathered("eva", layers) == ["start=eva holds at least 4.3 GB while it looks at rows"]
