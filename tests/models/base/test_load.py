from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model, load_base, load_tuned
from rankfold.errors import AdapterError, ConfigError, ModelError
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.models.base.find import DEFAULT_MODEL, find_base
from rankfold.models.base.load import load
from rankfold.models.base.text_side import load_text
from rankfold.models.choices import ModelRequest


def test_the_real_model_is_what_transformers_reads_from_the_gguf_file(real_base):
    """A second reading, by the gguf library alone, of one quantised and one plain tensor."""
    from gguf import GGUFReader, dequantize

    tensors = {t.name: t for t in GGUFReader(find_base(real_base.source.name).gguf_file).tensors}
    for name, ours in (
        ("blk.7.ffn_down.weight", real_base.model.model.layers[7].mlp.down_proj.weight),
        ("output_norm.weight", real_base.model.model.norm.weight),
    ):
        tensor = tensors[name]
        expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.detach(), expected.float())


def test_the_real_model_speaks_english_and_can_be_saved(real_base, tmp_path):
    text = real_base.tokenizer("The capital of France is", return_tensors="pt")
    best = real_base.model(**text).logits[0, -1].argmax()
    assert real_base.tokenizer.decode(best) == " Paris"
    real_base.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("quantization_config") is None


def test_an_expanded_model_is_kept_and_a_cache_that_cannot_be_written_is_only_a_note(
    tmp_path, monkeypatch, real_base
):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "file"))
    base = load_base(real_base.source.name)
    assert any("was not kept for next time" in note for note in base.notes)
    weight = base.model.model.layers[3].self_attn.q_proj.weight
    assert torch.equal(weight, real_base.model.model.layers[3].self_attn.q_proj.weight)


def test_a_model_folder_is_loaded_under_the_name_it_was_given(tiny_folder):
    base = load_base(str(tiny_folder))
    assert base.model.name_or_path == str(tiny_folder)
    assert base.model.dtype == torch.float32
    assert not base.model.training


@pytest.mark.parametrize("name", ["nobody/has-this-model", "HuggingFaceTB/SmolLM2-135M-Instrukt"])
def test_an_unknown_model_is_one_sentence(name):
    with pytest.raises(ModelError, match=f"cannot load the model '{name}'"):
        load_base(name)


def test_a_damaged_model_folder_is_one_sentence(tiny_folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_base(str(broken))


def test_a_damaged_gguf_file_is_one_sentence(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_base(str(tmp_path / "a.gguf"))


def test_a_tokenizer_of_another_model_is_refused(tiny_folder, tmp_path):
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "mixed"
    shutil.copytree(tiny_folder, folder)
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="has 49,152 entries but the model embeds 100"):
        load_base(str(folder))


def test_an_adapter_is_merged_into_the_base_that_it_names(tiny_folder, tmp_path):
    base = load_base(str(tiny_folder))
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path)
    AdapterMetadata(prompt_style="plain").write(tmp_path)
    ids = torch.randint(0, 49152, (1, 7))
    tuned = load_tuned(tmp_path)
    torch.testing.assert_close(tuned.model(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-6)
    assert [type(m) for m in tuned.model.modules()] == [type(m) for m in tiny_llama().modules()]
    assert tuned.prompt_style == "plain"


def test_an_adapter_that_names_no_base_needs_one_named(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="name it with --model"):
        load_tuned(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema_version": 99, "prompt_style": "chat"}', "newer rankfold"),
        ('{"schema_version": 1, "prompt_style": "rm -rf"}', "prompt_style must be"),
    ],
)
def test_damaged_facts_are_refused(tmp_path, content, message):
    (tmp_path / "rankfold.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        AdapterMetadata.read(tmp_path)


def test_a_tokenizer_is_loaded_without_the_weights(real_base, tiny_folder, tmp_path):
    tokenizer, _, longest = load_text(DEFAULT_MODEL)
    text = "Hats, 帽子 and <|im_end|>"
    assert tokenizer(text)["input_ids"] == real_base.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == real_base.tokenizer.chat_template
    assert longest == real_base.model.config.max_position_embeddings
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_text(str(tmp_path))[2] == 512
    with pytest.raises(ModelError, match="no such model folder"):
        load_text("./nowhere")


@pytest.fixture
def tiny_adapter(tiny_folder, tmp_path):
    model = get_peft_model(
        load_base(str(tiny_folder)).model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("asked", [{"precision": "bfloat16"}, {"stored": "int8"}])
def test_an_adapter_is_not_rounded_by_a_base_in_fewer_bytes(tiny_folder, tiny_adapter, asked):
    base = load(ModelRequest(adapter=tiny_adapter, model=str(tiny_folder), **asked))
    with safe_open(tiny_adapter / "adapter_model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    held = {name.replace(".default.", "."): value for name, value in base.model.named_parameters()}
    assert kept
    assert all(torch.equal(held[name], value) for name, value in kept.items())


def test_a_base_asked_in_bfloat16_computes_as_the_one_of_transformers(tiny_folder, tiny_adapter):
    from peft import PeftModel as TheirModel
    from transformers import AutoModelForCausalLM

    ours = load(ModelRequest(adapter=tiny_adapter, model=str(tiny_folder), precision="bfloat16"))
    theirs = TheirModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16), tiny_adapter
    )
    ids = torch.arange(40)[None]
    found, wanted = ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.016)  # a last bit of numbers about 1


def test_a_model_asked_for_as_it_is_is_merged(tiny_folder, tiny_adapter):
    base = load(ModelRequest(adapter=tiny_adapter, model=str(tiny_folder), precision="float32"))
    assert not any("lora_" in name for name, _ in base.model.named_parameters())


def test_a_fault_can_be_allowed_for_an_adapter_only(tiny_folder):
    with pytest.raises(ConfigError, match="there is no --adapter"):
        load(ModelRequest(model=str(tiny_folder), allow=["base"]))
