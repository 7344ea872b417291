from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import RankfoldWarning


class Centred(nn.Module):
    """Subtracts a mean that it follows while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


@pytest.mark.parametrize("saved", [False, True], ids=["left out", "saved"])
def test_a_buffer_that_training_changed_is_told_of_when_the_adapter_is_saved(saved, tmp_path):
    net = nn.Sequential(Centred(), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"] if saved else None)
    model = get_peft_model(net, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        model.eval()(torch.randn(3, 4))
        model.save_pretrained(tmp_path)
    model.train()(torch.randn(3, 4))
    if saved:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path)
    else:
        with pytest.warns(RankfoldWarning, match=r"1 buffers of the base have changed.*\(0\.mean\)"):
            model.save_pretrained(tmp_path)


def test_no_buffer_of_a_language_model_is_told_of(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).train()
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("print_trainable_paramters", "print_trainable_parameters"), ("merge_and_unlod", "merge_and_unload")],
)
def test_a_misspelt_call_is_answered_with_the_wrappers_own_name(asked, hint):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AttributeError, match=rf"nor the Sequential inside .*'{hint}'\?"):
        getattr(model, asked)


@pytest.mark.parametrize("options", [{"layers_to_transform": [7]}, {"layers_to_transform": 7}], ids=str)
def test_a_layer_number_beside_exact_names_is_told_to_choose_nothing(options):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="layers_to_transform: no target is in layer 7"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], **options))
