from __future__ import annotations

import pytest

from rankfold.errors import ConfigError, ModelError
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.load import load
from rankfold.models.base.tokens import with_tokens
from rankfold.models.choices import ModelRequest
from rankfold.models.messages.prompt import prompt_encoder

ASK = [{"role": "user", "content": "a <file_sep>b <|im_end|> <reponame>"}]


def test_named_special_tokens_are_tokens_and_all_others_stay_words(real_base):
    before = prompt_encoder(real_base.tokenizer).prompt_ids(ASK)
    tokenizer = with_tokens(real_base.tokenizer, "", ["<file_sep>"])
    after = prompt_encoder(tokenizer).prompt_ids(ASK)
    number = tokenizer.convert_tokens_to_ids("<file_sep>")
    assert (before.count(number), after.count(number)) == (0, 1)
    for word in ("<|im_end|>", "<reponame>"):
        other = tokenizer.convert_tokens_to_ids(word)
        assert before.count(other) == after.count(other)
    assert tokenizer.decode(after) == real_base.tokenizer.decode(before)
    assert "<file_sep>" in tokenizer.decode([1, number, 2], skip_special_tokens=True)
    assert real_base.tokenizer.decode([number], skip_special_tokens=True) == ""  # the base's own is as it was


@pytest.mark.parametrize(
    ("eos", "words", "told"),
    [
        ("", ["<|im_end|>"], "as_tokens: '<|im_end|>' opens or ends turns"),
        ("", ["<|im_start|>"], "as_tokens: '<|im_start|>' opens or ends turns"),
        ("", ["<|endoftext|>"], "as_tokens: '<|endoftext|>' opens or ends turns or texts"),
        ("", ["<file_sepp>"], "'<file_sepp>' is no special token of the model (did you mean '<file_sep>'?)"),
        ("", ["the"], "as_tokens: 'the' is no special token"),
        ("<eos>", [], "eos_token: '<eos>' is no token of the model"),
    ],
)
def test_what_cannot_be_taken_so_is_refused(eos, words, told, real_base):
    with pytest.raises(ConfigError) as caught:
        with_tokens(real_base.tokenizer, eos, words)
    assert told in str(caught.value)


def test_a_file_without_template_and_end_of_text_says_which_key_it_lacks(tmp_path):
    from gguf_files import tiny_model, vocabulary, write_gguf

    words = {key: value for key, value in vocabulary().items() if key != "eos_token_id"}
    words["tokens"] = [word.replace("</s>", "<end>").replace("<|im_end|>", "<x>") for word in words["tokens"]]
    path = write_gguf(tmp_path / "a.gguf", tiny_model("llama"), "llama", words=words)
    bare = load(ModelRequest(model=str(path)))
    with pytest.raises(ModelError, match=r"tokenizer.ggml.eos_token_id\): name that token with --eos-token"):
        reply(bare, [{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=2))
    named = load(ModelRequest(model=str(path), eos_token="<end>"))
    assert isinstance(reply(named, [{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=2)), str)
    assert named.tokenizer.eos_token == "<end>"
