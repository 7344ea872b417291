"""A run that goes on from an adapter."""

from __future__ import annotations

import json

import pytest
import torch

from rankfold import Recipe, fine_tune, load_tuned
from rankfold.errors import AdapterError, CheckpointError, ConfigError, ModelError
from rankfold.train.keeping.listener import Listener
from rankfold.train.run import decide, resume


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(out: str = "second", **options) -> Recipe:
        few = {"learning_rate": 1e-2, "samples": 0, "precision": "float32", "max_steps": 3, "epochs": 1}
        if "adapter" not in options:
            few["model"] = str(tiny_folder)
        return Recipe.of({"data": write_rows(joke_rows), "out": tmp_path / out} | few | options)

    return make


@pytest.fixture
def first(recipe, tmp_path):
    fine_tune(recipe("first", rank=4, alpha=12, targets="q_proj,v_proj"))
    return tmp_path / "first"


def test_a_run_starts_where_an_adapter_is(first, recipe):
    plan = decide(recipe(adapter=first), Listener())
    tuned = load_tuned(first)
    ids = torch.randint(0, 49152, (2, 9))
    with torch.no_grad():
        theirs, ours = tuned.model(ids).logits, plan.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    config = plan.model.peft_config["default"]
    assert (config.r, config.lora_alpha, sorted(config.target_modules)) == (4, 12, ["q_proj", "v_proj"])
    assert (plan.settings.rank, plan.settings.alpha) == (4, 12)
    trained = {name for name, p in plan.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_it_learns_on_and_the_first_adapter_stays_as_it_was(first, recipe):
    before = (first / "adapter_model.safetensors").read_bytes()
    result = fine_tune(recipe(adapter=first))
    assert (first / "adapter_model.safetensors").read_bytes() == before
    assert (result.out / "adapter_model.safetensors").read_bytes() != before
    assert result.comparison.gap != 0
    assert "adapter: " in (result.out / "recipe.yaml").read_text()
    load_tuned(result.out)


@pytest.mark.slow
def test_an_interrupted_one_goes_on_and_refuses_another_start(first, recipe, tmp_path):
    whole = fine_tune(recipe("whole", adapter=first, save_every_steps=1))

    class Stop(Listener):
        def on_step(self, record):
            if record.step == 1:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

    cut = fine_tune(recipe("cut", adapter=first, save_every_steps=1), Stop())
    assert cut.interrupted
    weights = first / "adapter_model.safetensors"
    kept = weights.read_bytes()
    facts = json.loads((first / "rankfold.json").read_text())
    weights.write_bytes(kept[:-4] + b"\x00\x00\x00\x00")
    (first / "rankfold.json").write_text(json.dumps(facts | {"sha256": {}}))
    with pytest.raises(CheckpointError, match="the adapter that it started from is another one"):
        resume(tmp_path / "cut")
    weights.write_bytes(kept)
    resume(tmp_path / "cut")
    assert (tmp_path / "cut" / "adapter_model.safetensors").read_bytes() == (
        whole.out / "adapter_model.safetensors"
    ).read_bytes()


def test_rows_of_another_style_are_told(first, recipe, write_rows):
    data = write_rows([{"text": f"Cat {n} sleeps on mat {n * 7}."} for n in range(24)], "texts.jsonl")
    told = "the adapter was trained on chat rows, and these are plain"
    assert told in decide(recipe(adapter=first, data=data), Listener()).notes
    assert told not in decide(recipe(adapter=first), Listener()).notes


def test_what_the_adapter_says_otherwise_is_told_at_once(first, recipe):
    with pytest.raises(ConfigError) as caught:
        decide(recipe(adapter=first, rank=8, alpha=4.0, dropout=0.1, targets="o_proj"), Listener())
    told = str(caught.value)
    assert "rank: 8, and the adapter has 4" in told
    assert "alpha: 4.0, and the adapter has 12" in told
    assert "dropout: 0.1, and the adapter has 0.0" in told
    assert "targets: ['o_proj'], and the adapter has ['q_proj', 'v_proj']" in told


def test_an_adapter_of_another_base_or_none_is_refused(first, recipe, tmp_path, tiny_folder):
    import shutil

    from conftest import tiny_llama

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_llama(seed=5).save_pretrained(other)
    with pytest.raises(AdapterError, match="belongs to another base model"):
        decide(recipe(adapter=first, model=str(other)), Listener())
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        decide(recipe(adapter=tmp_path / "nowhere"), Listener())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "adapter_config.json").write_text((first / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match=r"holds no adapter_model.safetensors: a run starts from"):
        decide(recipe(adapter=tmp_path / "bare"), Listener())
    whole = json.loads((other / "tokenizer.json").read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:-100]
    (other / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match="trained with: another splitting"):
        decide(recipe(adapter=first, model=str(other)), Listener())


@pytest.mark.slow
def test_tokens_that_rows_spell_are_counted_and_can_be_let_through(recipe, write_rows, joke_rows, tmp_path):
    rows = [dict(row, completion=f"<file_sep>{row['completion']}") for row in joke_rows]
    data = write_rows(rows, "tokens.jsonl")
    plan = decide(recipe(data=data), Listener())
    assert any("24 rows spell special tokens of the model (<file_sep>)" in note for note in plan.notes)
    number = plan.base.tokenizer.convert_tokens_to_ids("<file_sep>")
    assert not any(number in row.input_ids for row in plan.train)
    plan = decide(recipe(data=data, as_tokens="<file_sep>"), Listener())
    assert all(number in row.labels for row in plan.train)
    assert not any("spell special tokens" in note for note in plan.notes)
    out = fine_tune(recipe("told", data=data, as_tokens="<file_sep>")).out
    tuned = load_tuned(out)
    assert tuned.tokenizer.decode([number], skip_special_tokens=True) == "<file_sep>"
    again = decide(recipe("third", data=data, adapter=out), Listener())
    assert all(number in row.labels for row in again.train)
    both = fine_tune(recipe("fourth", data=data, adapter=out, as_tokens="<file_sep>,<reponame>")).out
    assert json.loads((both / "rankfold.json").read_text())["as_tokens"] == ["<file_sep>", "<reponame>"]
    assert fine_tune(recipe("fifth", data=data, adapter=both)).comparison is not None
    with pytest.raises(ConfigError, match="opens or ends turns"):
        decide(recipe(as_tokens="<|im_end|>"), Listener())
