from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import nn

from conftest import tiny_llama
from rankfold import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from rankfold.errors import AdapterError
from rankfold.peft_surface.status import TunerLayerStatus, TunerModelStatus

CASES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
]


class Mixed(nn.Module):
    """The layer types that a Llama does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 4, 8))
        self.experts.down = nn.Parameter(torch.randn(2, 8, 4))


def by_name(statuses) -> list[dict]:
    return sorted((dataclasses.asdict(status) for status in statuses), key=lambda s: s["name"])


def both(options, make=tiny_llama):
    ours = get_peft_model(make(), LoraConfig(r=2, **options))
    return ours, peft.get_peft_model(make(), peft.LoraConfig(r=2, **options))


def test_the_fields_are_pefts():
    for ours, theirs in (
        (TunerLayerStatus, peft.peft_model.TunerLayerStatus),
        (TunerModelStatus, peft.peft_model.TunerModelStatus),
    ):
        assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.peft("`get_layer_status`, `get_model_status`", "same", "same")
def test_the_status_is_pefts(options):
    ours, theirs = both(options)
    assert by_name(get_layer_status(ours)) == by_name(peft.get_layer_status(theirs))
    assert dataclasses.asdict(get_model_status(ours)) == dataclasses.asdict(peft.get_model_status(theirs))


def test_the_status_of_other_layer_types_is_pefts():
    options = {"target_modules": ["conv", "attention"], "target_parameters": ["experts.up", "experts.down"]}
    torch.manual_seed(0)
    ours, theirs = both(options, Mixed)
    assert by_name(get_layer_status(ours)) == by_name(peft.get_layer_status(theirs))


def test_the_status_follows_what_is_done_to_the_model():
    ours, theirs = both({"target_modules": ["q_proj"]})
    for model, config in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        model.add_adapter("second", config(r=2, target_modules=["q_proj", "v_proj"]))
    steps = [
        lambda model: model.set_adapter("second"),
        lambda model: model.merge_adapter(["second"]),
        lambda model: model.unmerge_adapter(),
        lambda model: (
            model.base_model.model.model.layers[0].self_attn.q_proj.merge(["second"])
            if model is theirs
            else merge_one_layer(model)
        ),
    ]
    for step in steps:
        for model in (ours, theirs):
            step(model)
        assert dataclasses.asdict(get_model_status(ours)) == dataclasses.asdict(peft.get_model_status(theirs))
    assert get_model_status(ours).merged_adapters == "irregular"


def merge_one_layer(model) -> None:
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.merge(adapter_names=["second"])


def test_layers_that_do_not_agree_are_irregular():
    ours, theirs = both({"target_modules": ["q_proj"]})
    for model in (ours, theirs):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["default"].weight.requires_grad_(False)
    layer = ours.base_model.model.model.layers[1].self_attn.q_proj
    layer.enable_adapters(False)
    theirs.base_model.model.model.layers[1].self_attn.q_proj.enable_adapters(False)
    status = get_model_status(ours)
    assert status.enabled == status.requires_grad["default"] == "irregular"
    assert status.enabled == peft.get_model_status(theirs).enabled


@pytest.mark.parametrize(
    ("make", "target"), [(tiny_llama, "q_proj"), (lambda: nn.Sequential(nn.Linear(4, 4)), "0")]
)
def test_a_model_without_a_wrapper_has_a_status_too(make, target):
    options = {"r": 2, "target_modules": [target]}
    ours = inject_adapter_in_model(LoraConfig(**options), make())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**options), make())
    assert dataclasses.asdict(get_model_status(ours)) == dataclasses.asdict(peft.get_model_status(theirs))


def test_a_model_without_adapters_has_none():
    with pytest.raises(AdapterError, match="No adapter layers found"):
        get_layer_status(tiny_llama())
