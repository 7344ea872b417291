"""A base becomes what an adapter was trained on."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model, load_base, load_tuned
from rankfold.errors import AdapterError, ModelError
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.lora.files.saved_embeddings import replaced_by

IDS = torch.arange(20)[None]
KINDS = {
    "every linear layer": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 49153]},
    "tokens alone": {"trainable_token_indices": {"embed_tokens": [3, 49153]}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}


def grown(folder, seed: int, rows: int = 49156):
    """A base whose vocabulary grew by new rows, which are drawn."""
    base = load_base(str(folder))
    torch.manual_seed(seed)
    base.model.resize_token_embeddings(rows)
    return base.model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_fingerprint_is_the_same_with_the_adapter_in_place(kind, tiny_folder, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **KINDS[kind])
    plain = grown(tiny_folder, 1)
    model = get_peft_model(grown(tiny_folder, 1), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    left_out = replaced_by(plain, config, [])
    assert fingerprint(model.get_base_model(), left_out) == fingerprint(plain, left_out)
    again = PeftModel.from_pretrained(grown(tiny_folder, 1), tmp_path, allow=())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_trained_tokens_fit_the_base_that_was_grown_once_more(tiny_folder, tmp_path):
    """New rows are drawn each time; those that the adapter brings are no mark of a base."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[49152, 49153]
    )
    model = get_peft_model(grown(tiny_folder, 1, 49154), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(grown(tiny_folder, 2, 49154), tmp_path, allow=())
    ids = torch.tensor([[5, 49152, 49153]])
    with torch.no_grad():
        theirs, ours = model(input_ids=ids).logits, again(input_ids=ids).logits
    torch.testing.assert_close(ours[..., :49152], theirs[..., :49152])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tokens", "embeddings saved", "rows beyond the tokenizer"])
def test_a_base_grows_as_the_adapters_tokenizer_says(kind, tiny_folder, tmp_path):
    base = load_base(str(tiny_folder))
    base.tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    rows = 49160 if kind == "rows beyond the tokenizer" else 49155
    base.model.resize_token_embeddings(rows)
    trained = {"trainable_token_indices": [49152, 49153, 49154]} if kind == "tokens" else {}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **trained)
    model = get_peft_model(base.model, config)
    randomise(model)
    model.save_pretrained(tmp_path, save_embedding_layers=kind != "tokens")
    base.tokenizer.save_pretrained(tmp_path)
    tuned = load_tuned(tmp_path)
    assert tuned.tokenizer.convert_tokens_to_ids("<two>") == 49153
    assert f"the base's vocabulary grew from 49,152 to {rows:,} rows" in tuned.notes[0]
    assert "has more words than the base's" in tuned.notes[1]
    ids = torch.tensor([tuned.tokenizer("<one> and <three>")["input_ids"]])
    with torch.no_grad():
        theirs, ours = model(input_ids=ids).logits, tuned.model(ids).logits
    torch.testing.assert_close(ours[..., :49152], theirs[..., :49152], rtol=1e-4, atol=1e-5)


def test_a_damaged_tokenizer_in_an_adapter_is_one_sentence(tiny_folder, tmp_path):
    model = get_peft_model(load_base(str(tiny_folder)).model, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot read the tokenizer in"):
        load_tuned(tmp_path)


def test_another_tokenizer_is_refused_and_can_be_allowed(tiny_folder, tmp_path):
    import json

    from rankfold.lora.files.adapter_metadata import AdapterMetadata
    from rankfold.models.base.tokenizer_marks import tokenizer_marks

    base = load_base(str(tiny_folder))
    out = tmp_path / "adapter"
    get_peft_model(base.model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        out, facts={"tokenizer": tokenizer_marks(base.tokenizer)}
    )
    assert AdapterMetadata.read(out).tokenizer
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    whole = json.loads((other / "tokenizer.json").read_text())
    whole["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (other / "tokenizer.json").write_text(json.dumps(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="trained with: another splitting"):
            load_tuned(out, str(other))
        assert "another splitting" in load_tuned(out, str(other), ["base"]).notes[-1]
