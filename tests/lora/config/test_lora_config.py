from __future__ import annotations

import dataclasses
import json

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold import LoraConfig, TaskType
from rankfold.errors import AdapterError, ConfigError
from rankfold.lora.config.checks import UNSET


@pytest.mark.peft(
    "`adapter_config.json`",
    "same; the order of `target_modules` differs from run to run",
    "same bytes each time",
)
def test_the_json_is_pefts_byte_for_byte(tmp_path):
    options = {"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    LoraConfig(**options).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**options).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / who / "adapter_config.json").read_bytes() for who in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.peft("fields and defaults of `LoraConfig`", "same", "same")
def test_fields_and_defaults_are_pefts():
    theirs = peft.LoraConfig().to_dict()
    theirs.pop("runtime_config", None)
    assert LoraConfig().to_dict() == theirs


def test_the_json_does_not_depend_on_the_order_of_a_set():
    names = {f"module_{n}" for n in range(50)}
    assert LoraConfig(target_modules=names).to_dict()["target_modules"] == sorted(names)


def test_rank_alpha_and_dropout_are_aliases():
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 32, "dropout": 0.1})
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 32, 0.1)
    assert (config.rank, config.alpha, config.dropout) == (4, 32, 0.1)


def test_an_alias_beside_its_own_name_is_refused():
    with pytest.raises(ConfigError, match="rank and r are the same option"):
        LoraConfig(rank=4, r=8)


def test_an_unknown_option_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown option 'rnak' \(did you mean 'rank'\?\)"):
        LoraConfig(rnak=4)


@pytest.mark.parametrize("rank", [0, -4, 2.5, "8", True, None, float("nan")])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ConfigError, match="r must be a whole number"):
        LoraConfig(r=rank)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16", None, True])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match="lora_alpha must be a finite number"):
        LoraConfig(lora_alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, "0.1", float("nan")])
def test_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(ConfigError, match="lora_dropout must be"):
        LoraConfig(lora_dropout=dropout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_type": "CAUSAL"}, "did you mean 'CAUSAL_LM'"),
        ({"target_modules": 7}, "target_modules must be a list of names"),
        ({"target_modules": ["q", 7]}, "target_modules must be a list of names"),
        ({"target_modules": [""]}, "target_modules must be a list of names"),
        ({"layers_to_transform": [-1], "target_modules": ["q"]}, "layer numbers from 0"),
        (
            {"layers_to_transform": 1, "target_modules": "q.*"},
            "cannot be used when `target_modules` is a str",
        ),
        ({"layers_pattern": "h", "target_modules": ["q"]}, "When `layers_pattern` is specified"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be a dictionary"),
        ({"use_rslora": "yes"}, "use_rslora must be True or False"),
        ({"init_lora_weights": "micah"}, "init_lora_weights must be"),
        ({"layer_replication": [[2, 1]]}, "layer_replication must be ranges"),
        ({"layer_replication": [2, 1]}, "layer_replication must be ranges"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication must be ranges"),
        ({"layer_replication": [[0, True]]}, "layer_replication must be ranges"),
        ({"layer_replication": [[0, 10**12]]}, "makes 1,000,000,000,000 layers"),
        ({"use_dora": 1}, "use_dora must be True or False"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha="x", task_type="X", use_qalora=True)
    assert all(word in str(caught.value) for word in ("r must", "lora_alpha", "task type", "use_qalora"))


@pytest.mark.parametrize("name", UNSET)
def test_what_is_not_there_yet_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}=.* is not supported"):
        LoraConfig(**{name: True})


def test_every_field_is_supported_checked_or_refused():
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names >= UNSET.keys()
    assert len(names) == 42


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoraConfig(use_rslora=True).scale(16, 32) == 8
    assert LoraConfig().scale(16, 32) == 2


@given(
    st.integers(1, 512),
    st.floats(0.01, 1e4),
    st.floats(0, 0.99),
    st.one_of(st.none(), st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1)),
    st.sampled_from([None, *TaskType]),
)
def test_any_valid_config_survives_the_file(tmp_path_factory, r, alpha, dropout, targets, task):
    folder = tmp_path_factory.mktemp("config")
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=task)
    config.save_pretrained(folder)
    assert LoraConfig.from_pretrained(folder).to_dict() == config.to_dict()


def test_a_config_written_by_peft_is_read(tmp_path):
    peft.LoraConfig(r=3, target_modules={"b", "a"}, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, sorted(config.target_modules), config.task_type) == (3, ["a", "b"], TaskType.CAUSAL_LM)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b'{"peft_type": "EVIL"}', "peft_type is 'EVIL'"),
        (b'{"peft_type": "LORA", "r": -1}', "whole number"),
        (b'{"peft_type": "LORA", "use_qalora": true}', "use_qalora=True is not supported"),
        (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is not a number"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_config_file_that_cannot_be_trusted_is_refused(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        LoraConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        LoraConfig.from_pretrained(tmp_path)


def test_nothing_in_a_config_file_imports_anything(tmp_path):
    options = LoraConfig().to_dict() | {
        "auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"},
        "megatron_core": "this",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    import sys

    LoraConfig.from_pretrained(tmp_path)
    assert not {"antigravity", "this"} & sys.modules.keys()
