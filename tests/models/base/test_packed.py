from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from torch import nn
from torch.nn import functional as F

from conftest import randomise, tiny_llama
from gguf_files import tiny_model, write_gguf
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ModelError
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.models.base.base import Base
from rankfold.models.base.find import DEFAULT_MODEL, BaseSource
from rankfold.models.base.load import load_base
from rankfold.models.base.packed import describe, held_model
from rankfold.models.base.text_side import load_text
from rankfold.models.running.head import output_head
from rankfold.storage.layers import HeldEmbedding, HeldLinear, held_layers

ALL_LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def small_llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def source_of(path: Path) -> BaseSource:
    return BaseSource(str(path), path, f"GGUF file {path.name}")


TYPES = {
    "q_proj.weight": "Q4_0",
    "k_proj.weight": "Q4_1",
    "v_proj.weight": "Q5_0",
    "o_proj.weight": "Q5_1",
    "gate_proj.weight": "F16",
    "up_proj.weight": "BF16",
    "embed_tokens.weight": "Q8_0",
}


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_of_many_types_stays_as_it_is(tied, tmp_path):
    model = small_llama(tied)
    write_gguf(tmp_path / "a.gguf", model, "llama", kind=TYPES)
    held = held_model(model.config, source_of(tmp_path / "a.gguf"), "gguf").eval()
    first = held.model.layers[0]
    forms = [first.self_attn.q_proj, first.self_attn.k_proj, first.mlp.up_proj, held.model.embed_tokens]
    assert [layer.form.name for layer in forms] == ["Q4_0", "Q4_1", "BF16", "Q8_0"]
    assert type(first.mlp.down_proj) is nn.Linear
    assert type(held.lm_head) is (HeldLinear if tied else nn.Linear)
    assert (held.lm_head.weight is held.model.embed_tokens.weight) is tied
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(held(ids).logits, model(ids).logits)
    assert fingerprint(held) == fingerprint(model)
    assert "held in" in describe(held)


def test_what_a_file_lacks_or_holds_otherwise_is_listed(tmp_path):
    model = small_llama()
    write_gguf(tmp_path / "a.gguf", model, "llama", left_out="blk.1.ffn_up.weight")
    model.config.vocab_size = 60
    with pytest.raises(ModelError) as caught:
        held_model(model.config, source_of(tmp_path / "a.gguf"), "gguf")
    message = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.embed_tokens.weight: its shape is (50, 256), wanted (60, 256)" in message


def test_blocks_without_a_form_are_refused_by_their_type_and_can_be_rounded(tmp_path):
    model = small_llama()
    write_gguf(tmp_path / "a.gguf", model, "llama", kind={"v_proj.weight": "TQ2_0"})
    with pytest.raises(
        ModelError, match=r"v_proj.weight: TQ2_0 is none of the types that can be kept \(BF16"
    ):
        held_model(model.config, source_of(tmp_path / "a.gguf"), "gguf")
    held = held_model(model.config, source_of(tmp_path / "a.gguf"), "bfloat16").eval()
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(held(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)


def test_a_file_that_was_cut_off_is_one_sentence(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model("llama"), "llama")
    (tmp_path / "a.gguf").write_bytes(whole.read_bytes()[:-100_000])
    for stored in ("gguf", None):
        with pytest.raises(ModelError, match="ends within the tensor .*: it was cut off"):
            load_base(str(tmp_path / "a.gguf"), stored=stored)


def test_an_architecture_that_only_transformers_reads_is_not_held(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", small_llama(), "llama", keys={"general.architecture": "gpt2"})
    with pytest.raises(ModelError, match="the weights of a gpt2 cannot be held; leave stored out"):
        held_model(small_llama().config, source_of(path), "gguf")


@pytest.mark.parametrize(("stored", "form"), [("int8", "INT8"), ("bfloat16", "BF16")])
def test_a_model_folder_is_rounded_tensor_by_tensor(stored, form, tiny_folder):
    base = load_base(str(tiny_folder), stored=stored)
    plain, layers = tiny_llama(), held_layers(base.model)
    assert {layer.form.name for layer in layers.values()} == {form}
    assert len(layers) == 2 * 7 + 2
    for path, layer in layers.items():
        weight = plain.get_submodule(path).weight.detach()
        torch.testing.assert_close(
            layer.expanded_weight(), weight, rtol=0.01, atol=0.01 * float(weight.abs().max())
        )
        with torch.no_grad():
            weight.copy_(layer.expanded_weight())
    ids = torch.randint(0, 49152, (2, 7))
    torch.testing.assert_close(base.model(ids).logits, plain(ids).logits)
    assert "16 weights are held in" in base.notes[0]
    assert base.model.name_or_path == str(tiny_folder)


def test_a_folder_in_shards_is_read_whole(tiny_folder, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="2MB")
    assert (folder / "model.safetensors.index.json").is_file()
    ids = torch.randint(0, 49152, (2, 7))
    wanted = load_base(str(tiny_folder), stored="int8").model(ids).logits
    assert torch.equal(load_base(str(folder), stored="int8").model(ids).logits, wanted)


def test_a_folder_has_no_blocks_to_keep(tiny_folder):
    with pytest.raises(ModelError, match="keeps a GGUF file's own blocks, and .* is no GGUF file"):
        load_base(str(tiny_folder), stored="gguf")


def test_q4_0_has_the_blocks_that_llama_cpp_would_make(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path)
    held = held_model(model.config, source_of(tmp_path), "q4_0")
    for path, layer in held_layers(held).items():
        weight = model.get_submodule(path).weight.detach().numpy()
        blocks = quantize(weight, gguf.GGMLQuantizationType.Q4_0)
        if path in ("model.embed_tokens", "lm_head"):
            assert layer.form.name == "INT8"
            continue
        assert layer.form.name == "rounded Q4_0"
        assert np.array_equal(layer.held.numpy(), blocks)


def test_what_cannot_be_rounded_to_blocks_is_named(tiny_folder, tmp_path):
    with pytest.raises(
        ModelError, match=r"down_proj.weight: a row of 40 numbers cannot be held as rounded Q4_0"
    ):
        load_base(str(tiny_folder), stored="q4_0")
    model = small_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="up_proj.weight: a weight with NaN or infinite values"):
        held_model(model.config, source_of(tmp_path), "q4_0")


FORMS_ON_A_CPU = {"bfloat16": 0.002, "int8": 0.03, "q4_0": 0.7, "nf4": 0.7}  # how far the loss may go
TEXT = "The snow man told a cold joke about a hat that was above all that, and nobody laughed but the ice."


@pytest.mark.slow
def test_the_loss_of_each_form_beside_float32(real_base, tmp_path, record_property):
    """On SmolLM2 and a sentence.  What its file was rounded to before has 5 bits, so 4 are rounded twice."""
    real_base.model.save_pretrained(tmp_path)
    real_base.tokenizer.save_pretrained(tmp_path)
    ids = real_base.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = float(real_base.model(input_ids=ids, labels=ids).loss)
        for stored, limit in FORMS_ON_A_CPU.items():
            model = load_base(str(tmp_path), stored=stored).model
            loss = float(model(input_ids=ids, labels=ids).loss)
            record_property(stored, loss - plain)
            print(f"{stored:9} {loss:.4f} beside {plain:.4f} in float32: {loss - plain:+.4f}")
            assert abs(loss - plain) < limit, stored


def test_an_unknown_form_is_refused_with_the_known_ones(tiny_folder):
    with pytest.raises(ModelError, match="stored='int4': take one of bfloat16, int8, q4_0, gguf, nf4"):
        load_base(str(tiny_folder), stored="int4")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def real_held(own_cache: Path) -> Base:
    """SmolLM2 from its file's blocks, read for the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKFOLD_CACHE", str(own_cache))
        return load_base(DEFAULT_MODEL, stored="gguf")


def test_the_real_model_computes_the_same_from_its_files_blocks(real_base, real_held):
    kinds = {type(layer) for layer in held_layers(real_held.model).values()}
    assert kinds == {HeldEmbedding, HeldLinear}
    assert "210 as Q4_1, 1 as Q8_0" in real_held.notes[-1]
    ids = torch.randint(3, 49152, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            real_held.model(ids).logits, real_base.model(ids).logits, rtol=1e-4, atol=1e-3
        )
    assert real_held.tokenizer("Hats, 帽子")["input_ids"] == real_base.tokenizer("Hats, 帽子")["input_ids"]
    assert real_held.model.generation_config.eos_token_id == real_base.model.generation_config.eos_token_id
    assert fingerprint(real_held.model) == fingerprint(real_base.model)


def test_a_training_step_of_the_real_model_has_the_gradients_of_the_expanded_one(
    real_held, fresh_base, tmp_path
):
    ids = torch.randint(3, 49152, (1, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for base in (fresh_base, real_held):
        model = get_peft_model(base.model, ALL_LINEAR).train()
        randomise(model)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    model.save_pretrained(tmp_path)
    model.unload()
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    PeftModel.from_pretrained(real_held.model, tmp_path).unload()


def test_an_adapter_trained_on_blocks_is_merged_into_the_expanded_base(tmp_path):
    model = small_llama()
    write_gguf(tmp_path / "a.gguf", model, "llama", kind=TYPES)
    held = get_peft_model(held_model(model.config, source_of(tmp_path / "a.gguf"), "gguf"), ALL_LINEAR).eval()
    randomise(held)
    held.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 50, (2, 9))
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, held(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_held_models_generate(real_held, real_base):
    ids = real_base.tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(real_held.model.generate(**ids, **options), real_base.model.generate(**ids, **options))


def test_how_an_answer_ends_is_read_from_the_folder(tiny_folder, tmp_path):
    folder = tmp_path / "ends"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_base(str(folder), stored="int8").model.generation_config.eos_token_id == [2, 7]
    (folder / "generation_config.json").unlink()
    assert load_base(str(folder), stored="int8").model.generation_config.eos_token_id == 2


def test_config_and_tokenizer_of_a_gguf_file_are_kept_for_next_time(real_held, own_cache, monkeypatch):
    assert [folder.name for folder in own_cache.iterdir()] == ["gguf"]
    monkeypatch.setenv("RANKFOLD_CACHE", str(own_cache))
    tokenizer, _, longest = load_text(DEFAULT_MODEL)
    text = "Hats, 帽子 and <|im_end|>"
    assert tokenizer(text)["input_ids"] == real_held.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == real_held.tokenizer.chat_template
    assert longest == real_held.model.config.max_position_embeddings


def test_losses_of_a_held_model_are_made_from_its_hidden_states(tmp_path):
    model = small_llama(tied=True)
    write_gguf(tmp_path / "a.gguf", model, "llama", kind=TYPES)
    held = held_model(model.config, source_of(tmp_path / "a.gguf"), "gguf").eval()
    ids, targets = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9))
    head = output_head(held, {"input_ids": ids})
    assert head.module is held.lm_head
    assert head.is_plain
    with torch.no_grad():
        hidden = head.hidden_states(held, {"input_ids": ids})
        found = head.losses(hidden.flatten(0, 1), targets.flatten())
        wanted = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
