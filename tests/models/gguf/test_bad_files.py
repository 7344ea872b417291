"""What a file says that cannot be done is refused by its name; nothing is skipped in silence."""

from __future__ import annotations

import contextlib
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import tiny_model, vocabulary, write_gguf
from rankfold import load_base
from rankfold.errors import ModelError
from rankfold.models.base.meta_model import load_outline

HEADER_BYTES = 9_000
F32 = gguf.GGMLQuantizationType.F32


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("whole") / "a.gguf", tiny_model("llama"), "llama")


def load(tmp_path: Any, name: str = "llama", architecture: str = "llama", **options: Any) -> Any:
    return load_base(str(write_gguf(tmp_path / "a.gguf", tiny_model(name), architecture, **options)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.new_kind_of_norm": 2}, "the key llama.new_kind_of_norm = 2 is none that is known"),
        ({"llama.expert_count": 8}, "the key llama.expert_count = 8"),
        ({"llama.block_count": None}, "the key llama.block_count is missing"),
        ({"llama.attention.head_count_kv": [2, 1, 2, 2]}, "is another one in each layer"),
        (
            {"llama.block_count": 2_000_000_000},
            "block_count is 2000000000, and there are tensors of 4 blocks",
        ),
        ({"llama.embedding_length": 32}, "embedding_length is 32, and the embedding is 64 wide"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.key_length": 4096}, "attention.head_count is 4, and the queries are 64 wide"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"llama.attention.causal": False}, "attention.causal is false"),
        (
            {"llama.attention.key_length": 16, "llama.attention.value_length": 8},
            "key_length and value_length differ",
        ),
        (
            {"llama.rope.scaling.type": "dynamic"},
            "rope.scaling.type is 'dynamic'; none, linear, yarn, longrope are",
        ),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, and heads are 16 wide"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5 without yarn or longrope"),
        ({"tokenizer.ggml.pre": "qwen-9"}, "pre is 'qwen-9', a splitting that is not known"),
        ({"tokenizer.ggml.model": "rwkv"}, "model is 'rwkv'; gpt2"),
        ({"tokenizer.ggml.merges": None}, "the key tokenizer.ggml.merges is missing"),
        (
            {"tokenizer.ggml.merges": ["t h", "t q"]},
            "1 of the tokenizer.ggml.merges make words that are no tokens: 'tq'",
        ),
        ({"tokenizer.ggml.tokens": ["a"] * 320}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokenizer.ggml.lowercase": True}, "the key tokenizer.ggml.lowercase is none that is known"),
        ({"tokenizer.ggml.token_type": [1] * 5}, "token_type has 5 entries for 320 tokens"),
        (
            {"split.count": 3, "split.no": 1},
            "is part 2 of 3; put them together with: llama-gguf-split --merge",
        ),
        ({"general.type": "mmproj"}, "holds no language model: its general.type is 'mmproj'"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused_by_its_name(keys, words, tmp_path):
    with pytest.raises(ModelError) as caught:
        load(tmp_path, keys=keys)
    assert words in str(caught.value)


def test_all_faults_of_the_keys_are_told_at_once(tmp_path):
    with pytest.raises(ModelError) as caught:
        load(
            tmp_path,
            keys={"llama.block_count": None, "llama.expert_count": 8, "llama.vocabulary": 1},
        )
    assert str(caught.value).count("\n  - ") == 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_header_with_other_bytes_is_read_or_refused_in_one_sentence(data, tiny_file, tmp_path_factory):
    content = bytearray(tiny_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, HEADER_BYTES))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "a.gguf"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ModelError):
        load_base(str(path))


def test_a_tensor_without_a_place_is_refused_by_its_name(tmp_path):
    extra = {"blk.0.attn_sinks.weight": (np.ones(4, np.float32), F32)}
    with pytest.raises(
        ModelError, match=r"holds tensors that a llama has no place for:\n  - blk.0.attn_sinks.weight"
    ):
        load(tmp_path, extra=extra)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        load(tmp_path, left_out="blk.1.ffn_up.weight")


def test_positions_are_not_scaled_twice(tmp_path):
    extra = {"rope_freqs.weight": (np.full(8, 2.0, np.float32), F32)}
    with pytest.raises(ModelError, match="the positions are scaled twice: longrope .* and linear x4"):
        load(tmp_path, "llama-linear", extra=extra)
    extra = {"rope_freqs.weight": (np.full(5, 2.0, np.float32), F32)}
    with pytest.raises(ModelError, match=r"rope_freqs.weight has the shape \(5,\), wanted \(8,\)"):
        load(tmp_path, extra=extra)


def test_granite_without_rotary_positions_is_refused(tmp_path):
    with pytest.raises(ModelError, match="which means no rotary positions"):
        load(tmp_path, "granite", "granite", keys={"granite.rope.scaling.finetuned": False})


@pytest.mark.parametrize("cut", [30, 3_000, 20_000])
def test_a_file_that_is_cut_anywhere_is_one_sentence(cut, tmp_path):
    whole = write_gguf(tmp_path / "a.gguf", tiny_model("llama"), "llama").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[:cut])
    with pytest.raises(ModelError, match="cannot load the model|was cut off"):
        load_base(str(tmp_path / "b.gguf"))


@pytest.mark.parametrize(
    ("name", "architecture", "told"),
    [
        ("llama-llama3", "llama", "rope scaling llama3 x8 from the file"),
        (
            "llama-llama3-early",
            "llama",
            "rope scaling longrope by a divisor for each frequency from the file",
        ),
        ("qwen2-yarn", "qwen2", "rope scaling yarn x4 from the file"),
        ("llama", "llama", ""),
    ],
)
def test_what_scales_the_positions_is_told_and_so_is_in_the_plan(name, architecture, told, tmp_path):
    base = load(tmp_path, name, architecture)
    again = load_base(str(tmp_path / "a.gguf"))  # from what was kept
    outline = load_outline(str(tmp_path / "a.gguf"))
    tiny_words = tmp_path / "words"
    base.tokenizer.save_pretrained(tiny_words)
    other = load_outline(str(tmp_path / "a.gguf"), str(tiny_words))  # with a tokenizer from elsewhere
    for notes in (base.notes, again.notes, outline.notes, other.notes):
        assert notes == ([told] if told else [])


def test_what_llama_cpp_leaves_unread_is_left_unread_and_told(tmp_path):
    base = load(tmp_path, keys={"llama.attention.sliding_window": 8, "general.name": "mistral"})
    assert base.notes == ["llama.attention.sliding_window = 8 is left unread, as by llama.cpp"]
    assert base.model.config.model_type == "llama"


def test_a_padded_embedding_keeps_its_rows(tmp_path):
    """The tokenizer may have fewer words than the embedding has rows; it is the rows that count."""
    words = vocabulary()
    words = words | {"tokens": words["tokens"][:300], "token_type": words["token_type"][:300]}
    words["merges"] = words["merges"][: 300 - 262]
    base = load(tmp_path, words=words)
    assert (len(base.tokenizer), base.model.config.vocab_size) == (300, 320)


@pytest.mark.parametrize("stored", ["gguf", "int8", "bfloat16"])
def test_a_file_held_in_blocks_is_read_the_same_way(stored, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny_model("gemma2"), "gemma2", kind="Q8_0")
    plain, held = load_base(str(path)), load_base(str(path), stored=stored)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(held.model(ids).logits, plain.model(ids).logits, rtol=0.1, atol=0.5)


def test_what_only_transformers_reads_is_read_and_said(tmp_path):
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = Starcoder2Config(
        **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "norm_epsilon": 1e-5,
        },
    )
    torch.manual_seed(0)
    model = Starcoder2ForCausalLM(config).eval()
    config.rms_norm_eps = 1e-5  # what the writer looks for
    keys = {"starcoder2.attention.layer_norm_epsilon": 1e-5}
    path = write_gguf(tmp_path / "a.gguf", model, "starcoder2", keys=keys)
    base = load_base(str(path))
    assert base.notes[0].startswith("starcoder2 is read by transformers; compared with llama.cpp are llama, ")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert base.tokenizer("the")["input_ids"] == [base.tokenizer.convert_tokens_to_ids("th"), 68]
    path = write_gguf(path, model, "starcoder2", keys=keys | {"starcoder2.rope.scaling.factor": 4.0})
    with pytest.raises(ModelError, match="scaled positions of a starcoder2"):
        load_base(str(path))
    path = write_gguf(path, model, "starcoder2", keys=keys, left_out="blk.1.ffn_up.bias")
    with pytest.raises(ModelError, match="mlp.c_fc.bias is missing"):
        load_base(str(path))
    path = write_gguf(
        path, model, "starcoder2", keys=keys, extra={"blk.0.new": (np.ones(4, np.float32), F32)}
    )
    with pytest.raises(ModelError, match="numbers, and the model has"):
        load_base(str(path))
