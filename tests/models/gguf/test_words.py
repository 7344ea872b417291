"""A tokenizer of transformers as GGUF's keys, read back by what llama.cpp was compared with."""

from __future__ import annotations

import pytest

from engines import reference
from engines.strings import strings
from gguf_files import write_vocabulary
from rankfold.errors import ModelError
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tokenizer import KEY, gguf_tokenizer, splits
from rankfold.models.gguf.words import tokenizer_keys

FILES = ["smollm", "pieces", "pieces-without-space", "chatml"]
SLOW = ["llama-bpe", "qwen2", "tekken", "deepseek-v3"]


def written(folder, tokenizer, rows):
    keys = tokenizer_keys(tokenizer, rows)
    own = {key.removeprefix(KEY): value for key, value in keys.items() if key.startswith(KEY)}
    more = {key: value for key, value in keys.items() if not key.startswith(KEY)}
    return read_gguf(write_vocabulary(folder / "again.gguf", own, **more))


@pytest.mark.parametrize("name", [*FILES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_tokenizer_that_is_written_cuts_text_as_before(tmp_path, name):
    file = read_gguf(reference.write_words(tmp_path, f"{name}.vocab.gguf"))
    tokenizer = gguf_tokenizer(file)
    again = written(tmp_path, tokenizer, len(file.keys[f"{KEY}tokens"]))
    texts = strings()[:400]
    other = gguf_tokenizer(again)
    assert other(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert other.chat_template == tokenizer.chat_template
    assert other.special_tokens_map == tokenizer.special_tokens_map
    for key in ("tokens", "token_type", "merges"):
        assert again.keys.get(KEY + key) == file.keys.get(KEY + key), key
    if name in splits():
        assert splits()[again.keys[f"{KEY}pre"]] == splits()[name]


def test_rows_without_a_word_are_filled_and_are_no_words(tmp_path):
    file = read_gguf(reference.write_words(tmp_path, "chatml.vocab.gguf"))
    rows = len(file.keys[f"{KEY}tokens"]) + 3
    keys = tokenizer_keys(gguf_tokenizer(file), rows)
    assert keys[f"{KEY}tokens"][-3:] == [f"[PAD{rows - left}]" for left in (3, 2, 1)]
    assert keys[f"{KEY}token_type"][-3:] == [5, 5, 5]


def test_a_tokenizer_that_gguf_has_no_words_for_is_refused(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0))
    with pytest.raises(ModelError, match="the tokenizer is a Unigram"):
        tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=unigram), 2)
    tokenizer = gguf_tokenizer(read_gguf(reference.write_words(tmp_path, "chatml.vocab.gguf")))
    cut = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    own = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = own
    with pytest.raises(ModelError, match="llama.cpp has no name for"):
        tokenizer_keys(tokenizer, 320)
