from __future__ import annotations

import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from conftest import tiny_llama
from rankfold import LoraConfig, TaskType, get_peft_model
from rankfold.errors import ConfigError, RankfoldWarning, TargetError
from rankfold.lora.placing.targets import USUAL_TARGETS, find_targets, is_target, module_names, shortest_list

part = st.sampled_from(["q", "v", "qv", "0", "1", "2", "layers", "h", "experts", "mlp", "head"])
name = st.lists(part, min_size=1, max_size=5).map(".".join)
entry = st.lists(part, min_size=1, max_size=2).map(".".join)
pattern = st.sampled_from(["q", r".*\.q", r".*(q|v)", r"layers\.\d+\..*", "", "mlp.*"])


@settings(max_examples=500, deadline=None)
@given(
    name,
    st.one_of(st.lists(entry, min_size=1, max_size=3), pattern.filter(bool)),
    st.one_of(st.none(), st.lists(entry, max_size=2), pattern.filter(bool)),
    st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
    st.sampled_from([None, "layers", ["h", "layers"]]),
)
@pytest.mark.peft("which modules are meant (list, pattern, `exclude_modules`, layers)", "same", "same")
def test_a_module_is_chosen_exactly_as_in_peft(name, targets, excluded, layers, layers_pattern):
    options = {"target_modules": targets, "exclude_modules": excluded}
    if not isinstance(targets, str) and layers is not None:
        options |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    try:
        expected = check_target_module_exists(peft.LoraConfig(**options), name)
    except UnboundLocalError:
        return  # PEFT's own slip: an empty layers_pattern list
    theirs = bool(expected) and "Excluded" not in type(expected).__name__
    config = LoraConfig(**options)
    wanted = targets if isinstance(targets, str) else frozenset(targets)
    assert is_target(name, wanted, config) == theirs


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*mlp\.(up|down)_proj", None])
@pytest.mark.peft('`"all-linear"` and the usual targets of an architecture', "same", "same")
def test_a_language_model_is_matched_as_in_peft(targets):
    options = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    ours = find_targets(tiny_llama(), LoraConfig(**options))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).targeted_module_names
    assert ours == theirs


def test_all_linear_leaves_out_the_output_head():
    targets = find_targets(tiny_llama(), LoraConfig(target_modules="ALL-LINEAR"))
    assert len(targets) == 14
    assert "lm_head" not in targets


def test_all_linear_leaves_out_a_classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForSequenceClassification(config)
    targets = find_targets(model, LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    assert len(targets) == 7


@pytest.mark.peft('`"all-linear"` and the usual targets of an architecture', "same", "same")
def test_the_usual_targets_are_pefts():
    assert USUAL_TARGETS == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_a_pattern_that_matches_nothing_shows_names_that_exist():
    with pytest.raises(TargetError, match=r"Target modules \{'q_porj'\} not found.*nearest names: q_proj"):
        find_targets(tiny_llama(), LoraConfig(target_modules=["q_porj"]))
    with pytest.raises(TargetError, match="matched n"):
        find_targets(tiny_llama(), LoraConfig(target_modules=r"zzz\d+"))


def test_one_wrong_entry_beside_good_ones_is_told_of_with_the_nearest_name():
    with pytest.warns(RankfoldWarning, match=r"nothing is called 'k_prj' \(did you mean 'k_proj'"):
        found = find_targets(tiny_llama(), LoraConfig(target_modules=["q_proj", "k_prj"]))
    assert len(found) == 2


def test_layers_beyond_the_last_are_an_error():
    with pytest.raises(TargetError, match=r"layers_to_transform"):
        find_targets(tiny_llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[9]))


def test_an_architecture_without_a_usual_choice_says_so():
    with pytest.raises(TargetError, match="set target_modules"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_an_invalid_pattern_is_named():
    with pytest.raises(ConfigError, match=r"'\(' is not a valid regular expression"):
        find_targets(tiny_llama(), LoraConfig(target_modules="("))


def test_a_layer_that_cannot_be_adapted_is_named_and_nothing_changes():
    model = tiny_llama()
    types = [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match="model.norm is a LlamaRMSNorm"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "norm"]))
    assert [type(m) for m in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_above_the_weight_is_told_for_every_layer_at_once():
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3), nn.Linear(9, 9))
    with pytest.warns(UserWarning, match="rank exceeds") as caught:
        get_peft_model(model, LoraConfig(r=5, target_modules=["0", "1", "2"]))
    assert "0: rank 5 on a 9x4 weight" in str(caught[0].message)
    assert "1: rank 5 on a 3x9 weight" in str(caught[0].message)
    assert "2:" not in str(caught[0].message)


@settings(deadline=None)
@given(st.sets(name, min_size=1, max_size=12), st.data())
def test_the_shortest_list_means_exactly_the_targets(names, data):
    ordered = sorted(names)
    targets = data.draw(st.lists(st.sampled_from(ordered), min_size=1, unique=True))
    listed = shortest_list(targets, ordered)
    wanted = listed if isinstance(listed, str) else frozenset(listed)
    assert {n for n in ordered if is_target(n, wanted, LoraConfig())} == set(targets)
    if isinstance(listed, list):
        assert len(listed) <= len(targets)
        for one in ordered:
            in_peft = one in listed or any(re.match(rf".*\.{re.escape(e)}$", one) for e in listed)
            assert in_peft == (one in targets)


def test_a_30_layer_model_is_listed_by_its_seven_names():
    model = tiny_llama()
    targets = find_targets(model, LoraConfig(target_modules="all-linear"))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert shortest_list(targets, module_names(model)) == names


@pytest.mark.peft("`rank_pattern`, `alpha_pattern`", "same", "same")
def test_rank_and_alpha_patterns_are_read_as_in_peft():
    options = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 3},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 7},
    }
    ours, theirs = tiny_llama(), tiny_llama()
    from rankfold import get_peft_model

    torch.manual_seed(0)
    get_peft_model(ours, LoraConfig(**options))
    torch.manual_seed(0)
    peft.get_peft_model(theirs, peft.LoraConfig(**options))
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = ours.get_submodule(name)
            assert (layer.r, layer.scaling) == (module.r, module.scaling)
