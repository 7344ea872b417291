"""What is odd is done, and said: each of the warnings that the other tests do not look at."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, NoMatchError


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(), nn.Linear(8, 8, bias=bias))


def test_a_start_that_changes_the_base_beside_another_adapter():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="PiSSA changes the base weights of the model"):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))


def test_deleting_the_active_adapter():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted.*second"):
        model.delete_adapter("default")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eva_config": {"rho": 2.0}}, "`eva_config` specified but will be ignored when"),
        ({"init_lora_weights": "eva"}, "`eva_config` is not specified. Using default EVA"),
    ],
    ids=["without its start", "a start without it"],
)
def test_a_sub_config_without_its_start_and_the_other_way_round(options, told):
    with pytest.warns(UserWarning, match=re.escape(told)):
        LoraConfig(target_modules=["0"], **options)


def test_embeddings_that_are_saved_because_they_are_targets(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)


def test_a_tied_weight_that_the_adapter_does_not_tie_and_what_merging_does_to_it():
    base = tiny_llama(tied=True)
    with pytest.warns(UserWarning, match="the weight is another module's too, which this adapter leaves"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens"]))
    randomise(model)
    ids = torch.arange(6)[None]
    expected = model.eval()(input_ids=ids).logits
    with pytest.warns(UserWarning, match="Input and output embeddings are no longer tied after merging"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)
    assert merged.config.tie_word_embeddings is False


def test_a_bias_of_b_on_a_layer_without_bias():
    with pytest.warns(UserWarning, match="`lora_bias=True` was passed but the targeted layer of type Linear"):
        get_peft_model(net(bias=False), LoraConfig(r=2, target_modules=["0"], lora_bias=True))


def test_rslora_with_patterns_and_a_start_that_changes_the_base():
    options = {"rank_pattern": {"0": 4}, "use_rslora": True, "init_lora_weights": "pissa"}
    with pytest.warns(UserWarning, match="Using Rank-Stabilized LoRA with rank_pattern"):
        LoraConfig(r=2, target_modules=["0"], **options)


@pytest.mark.parametrize("value", [None, False, {}, [], "", "on", 0.5], ids=repr)
def test_an_option_of_a_newer_peft(value, tmp_path):
    """One that is empty is told of; one that says something is told to change what is computed, perhaps."""
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"])).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_newest": value}))
    (tmp_path / "rankfold.json").unlink()  # which PEFT does not write
    with pytest.warns(UserWarning, match="use_newest"):
        loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    if value:
        with pytest.warns(UserWarning, match="use_newest"), pytest.raises(AdapterError, match="use_newest"):
            PeftModel.from_pretrained(net(), tmp_path, allow=())


def test_a_string_is_a_pattern_for_the_whole_name():
    with pytest.raises(
        NoMatchError, match=r"regular expression for a module's whole dotted name.*\['q_proj'\]"
    ):
        get_peft_model(tiny_llama(), LoraConfig(target_modules="q_proj"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_of_mixed_classes_is_copied_and_pickled(options, copied):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, **options)).eval()
    randomise(model)
    twin, ids = copied(model), torch.arange(6)[None]
    assert type(twin) is type(model)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    twin.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
