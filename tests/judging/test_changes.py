from __future__ import annotations

import pytest
import torch

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.judging.changes import moved


def test_the_update_of_each_kind_of_layer_is_that_of_the_dense_weights():
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    model = get_peft_model(tiny_llama(), config)
    randomise(model)
    before = {name: layer.weight.detach().double().clone() for name, layer in _layers(model)}
    found = {each.kind: each for each in moved(model)}
    model.merge_adapter()
    after = {name: layer.weight.detach().double() for name, layer in _layers(model)}
    model.unmerge_adapter()
    assert set(found) == {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "model.embed_tokens"}
    for kind, each in found.items():
        shares = {
            name: float((after[name] - before[name]).norm() / before[name].norm())
            for name in before
            if name.endswith(kind)
        }
        assert each.layers == len(shares)
        assert each.mean == pytest.approx(sum(shares.values()) / len(shares), rel=1e-4)
        assert each.most == pytest.approx(max(shares.values()), rel=1e-4)
        assert shares[each.most_in] == pytest.approx(each.most, rel=1e-4)
    means = [each.mean for each in moved(model)]
    assert means == sorted(means, reverse=True)


def _layers(model):
    kinds = torch.nn.Linear | torch.nn.Embedding
    found = model.get_base_model().named_modules()
    return [(name, layer) for name, layer in found if isinstance(layer, kinds)]


def test_an_adapter_that_was_never_trained_moves_nothing():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert [(each.kind, each.mean, each.most) for each in moved(model)] == [("self_attn.q_proj", 0.0, 0.0)]
