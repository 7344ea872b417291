from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

import rankfold
from conftest import randomise, tiny_llama
from rankfold import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from rankfold.errors import AdapterError, ModelError
from rankfold.models.base.auto import AUTO_CLASSES

IDS = torch.arange(6)[None] + 1
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def saved(folder, model: nn.Module, task: str | None, target: str):
    """A base in ``folder/base`` and an adapter of it in ``folder/adapter``."""
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target], task_type=task)).eval()
    randomise(adapted)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted


def bert(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **SIZES)
    return getattr(transformers, kind)(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).eval()


CASES = {
    "AutoPeftModelForCausalLM": ("CAUSAL_LM", tiny_llama, "q_proj"),
    "AutoPeftModelForSeq2SeqLM": ("SEQ_2_SEQ_LM", t5, "q"),
    "AutoPeftModelForSequenceClassification": (
        "SEQ_CLS", lambda: bert("BertForSequenceClassification"), "query",
    ),
    "AutoPeftModelForTokenClassification": ("TOKEN_CLS", lambda: bert("BertForTokenClassification"), "query"),
    "AutoPeftModelForQuestionAnswering": ("QUESTION_ANS", lambda: bert("BertForQuestionAnswering"), "query"),
    "AutoPeftModelForFeatureExtraction": ("FEATURE_EXTRACTION", lambda: bert("BertModel"), "query"),
    "AutoPeftModel": (None, tiny_llama, "q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_loaded_that_the_adapter_names_as_in_peft(name, tmp_path):
    task, make, target = CASES[name]
    folder, adapted = saved(tmp_path, make(), task, target)
    ours = getattr(rankfold, name).from_pretrained(folder)
    theirs = getattr(peft, name).from_pretrained(folder)
    assert type(ours).__name__ == type(theirs).__name__ == type(adapted).__name__
    inputs = {"input_ids": IDS} | ({"labels": IDS} if task == "SEQ_2_SEQ_LM" else {})
    expected = adapted(**inputs)
    for model in (ours, theirs.eval()):
        for found, wanted in zip(model(**inputs).to_tuple(), expected.to_tuple(), strict=True):
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(found, wanted)


def test_every_class_is_public():
    assert {kind.__name__ for kind in AUTO_CLASSES} == CASES.keys()


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    folder, _ = saved(tmp_path, tiny_llama().to(torch.bfloat16), "CAUSAL_LM", "q_proj")
    assert AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model().dtype == torch.bfloat16
    wide = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, is_trainable=True)
    assert wide.get_base_model().dtype == torch.float32
    assert any(parameter.requires_grad for parameter in wide.parameters())


def test_an_adapter_of_another_task_is_refused_with_the_right_class(tmp_path):
    folder, _ = saved(tmp_path, tiny_llama(), "CAUSAL_LM", "q_proj")
    with pytest.raises(AdapterError, match="CAUSAL_LM; load it with AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(folder)


def test_a_model_class_from_anywhere_else_is_not_looked_up(tmp_path):
    folder, _ = saved(tmp_path, tiny_llama(), None, "q_proj")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for named in ("os", "pipeline", "AutoConfig", "__loader__", 3):
        config["auto_mapping"] = {"base_model_class": named, "parent_library": "antigravity"}
        path.write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="which is none of transformers'"):
            AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize("named", ["", "../nowhere", "https://example.org/model", "/etc", "file:///etc"])
def test_a_base_that_cannot_be_one_is_refused_without_a_call(tmp_path, named):
    folder, _ = saved(tmp_path, tiny_llama(), "CAUSAL_LM", "q_proj")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    with pytest.raises(ModelError, match="does not say which base|no such model folder|is not a model"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_it_is_loaded_and_not_made():
    with pytest.raises(TypeError, match=r"use its from_pretrained\(folder\)"):
        AutoPeftModelForCausalLM()


def test_a_tokenizer_beside_the_adapter_that_has_grown_makes_the_base_grow(tmp_path, real_base):
    import copy

    tokenizer = copy.deepcopy(real_base.tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", allow={"base"})
    assert loaded.get_base_model().get_input_embeddings().weight.shape[0] == len(tokenizer)
    torch.testing.assert_close(loaded(IDS + 49000).logits, model(IDS + 49000).logits)


def test_a_gguf_base_serves_a_language_model_and_nothing_else(tmp_path, real_base):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    model = get_peft_model(rankfold.load_base(real_base.source.name).model, config)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_base_model().name_or_path == real_base.source.name
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("CAUSAL_LM", "TOKEN_CLS"))
    with pytest.raises(ModelError, match="a GGUF file can be loaded as a causal language model only"):
        rankfold.AutoPeftModelForTokenClassification.from_pretrained(tmp_path)
