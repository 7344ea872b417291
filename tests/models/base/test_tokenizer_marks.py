from __future__ import annotations

import copy
import json
import sys

import pytest

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model, load_tuned
from rankfold.errors import AdapterError, ModelError
from rankfold.lora.files.adapter_metadata import SCHEMA_VERSION, AdapterMetadata, versions
from rankfold.models.base.load import load_base
from rankfold.models.base.tokenizer_marks import tokenizer_changes, tokenizer_marks
from rankfold.models.messages.plain_template import PLAIN_NAME, PLAIN_TEMPLATES
from rankfold.models.messages.template import template_of


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """An adapter of the tiny model folder, with its tokenizer's marks."""
    base = load_base(str(tiny_folder))
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(model)
    facts = {"prompt_style": "plain", "tokenizer": tokenizer_marks(base.tokenizer)}
    model.save_pretrained(tmp_path / "adapter", facts=facts)
    return tmp_path / "adapter"


def test_facts_survive_writing_and_reading(adapter, tmp_path):
    facts = AdapterMetadata.read(adapter)
    assert facts.prompt_style == "plain"
    assert facts.base is not None
    assert facts.base.storage == "bfloat16"
    facts.write(tmp_path)
    assert (tmp_path / "rankfold.json").read_bytes() == (adapter / "rankfold.json").read_bytes()


def test_facts_of_the_first_schema_are_read(tmp_path):
    (tmp_path / "rankfold.json").write_text(
        '{"base_description": "a folder", "prompt_style": "plain", "schema_version": 1}'
    )
    facts = AdapterMetadata.read(tmp_path)
    assert (facts.prompt_style, facts.base_description, facts.base) == ("plain", "a folder", None)
    assert facts.schema_version == SCHEMA_VERSION


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"shapes": "a"}},
        {"base": {"shapes": "a", "values": "b", "storage": "c", "more": "d"}},
        {"base": 3},
        {"sha256": {"adapter_model.safetensors": 3}},
        {"versions": ["torch"]},
        {"base_description": None},
        {"schema_version": "2"},
        {"image_tiles": 0},
        {"image_tiles": True},
    ],
    ids=str,
)
def test_facts_of_a_wrong_kind_are_damage(adapter, change):
    path = adapter / "rankfold.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match="is damaged"):
        AdapterMetadata.read(adapter)


def test_transformers_is_named_only_where_it_is_in_use(monkeypatch):
    assert versions().keys() == {"rankfold", "torch", "transformers"}
    monkeypatch.delitem(sys.modules, "transformers")
    assert versions().keys() == {"rankfold", "torch"}


def test_the_marks_tell_a_vocabulary_its_splitting_and_its_template_apart(real_base):
    tokenizer = copy.deepcopy(real_base.tokenizer)
    marks = tokenizer_marks(tokenizer)
    assert marks.keys() == {"vocabulary", "splitting", "chat_template"}
    assert tokenizer_changes(marks, real_base.tokenizer) == []
    tokenizer.chat_template += " "
    assert tokenizer_changes(marks, tokenizer) == ["chat_template"]
    tokenizer.add_tokens(["<one more>"])
    assert tokenizer_changes(marks, tokenizer) == ["vocabulary", "splitting", "chat_template"]


def test_padding_and_truncation_set_by_a_call_are_no_marks(real_base):
    tokenizer = copy.deepcopy(real_base.tokenizer)
    before = tokenizer_marks(tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=9)
    assert tokenizer_marks(tokenizer) == before


def test_an_adapter_is_not_merged_under_another_tokenizer(adapter, tiny_folder, tmp_path):
    assert load_tuned(adapter).prompt_style == "plain"
    other = tmp_path / "other"
    tiny_llama().save_pretrained(other)
    tokenizer = load_base(str(tiny_folder)).tokenizer
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="not the one that .* was trained with: another chat_template"):
        load_tuned(adapter, str(other))
    base = load_tuned(adapter, str(other), allow={"base"})
    assert base.notes == ["the tokenizer has another chat_template than in training"]


def test_a_run_leaves_marks_and_fingerprint_and_its_adapter_loads_without_a_word(
    tiny_folder, write_rows, joke_rows, tmp_path, caplog
):
    from rankfold import Recipe, fine_tune

    settings = {"model": str(tiny_folder), "out": tmp_path / "run", "epochs": 1, "samples": 0}
    out = fine_tune(Recipe.of(settings | {"data": write_rows(joke_rows), "learning_rate": 1e-3})).out
    facts = AdapterMetadata.read(out)
    assert facts.tokenizer == tokenizer_marks(load_base(str(tiny_folder)).tokenizer)
    assert facts.base_description == f"folder {tiny_folder}"
    caplog.clear()
    load_tuned(out)
    assert not caplog.records


@pytest.mark.slow
def test_an_adapter_on_a_base_without_a_template_names_the_plain_one_and_brings_it_back(
    tiny_folder, write_rows, joke_rows, tmp_path
):
    from rankfold import Recipe, fine_tune

    bare, template = tmp_path / "bare", load_base(str(tiny_folder)).tokenizer.chat_template
    tokenizer = load_base(str(tiny_folder)).tokenizer
    tokenizer.chat_template = None
    tiny_llama().save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    settings = {"model": str(bare), "out": tmp_path / "run", "epochs": 1, "samples": 1}
    out = fine_tune(Recipe.of(settings | {"data": write_rows(joke_rows)})).out
    assert AdapterMetadata.read(out).chat_template == PLAIN_NAME
    assert template_of(load_tuned(out).tokenizer)[1] == PLAIN_TEMPLATES[PLAIN_NAME]
    tokenizer.chat_template = template  # as an update of the base might bring
    tokenizer.save_pretrained(bare)
    assert load_tuned(out).tokenizer.chat_template == PLAIN_TEMPLATES[PLAIN_NAME]


def test_facts_from_before_plain_templates_can_be_read(adapter):
    path = adapter / "rankfold.json"
    old = json.loads(path.read_text())
    del old["chat_template"]
    path.write_text(json.dumps(old))
    assert AdapterMetadata.read(adapter).chat_template == ""
