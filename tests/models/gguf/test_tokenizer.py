"""What a file says of single tokens and templates; how texts are cut is judged in ``test_reference``."""

from __future__ import annotations

import pytest

from gguf_files import tiny_model, vocabulary, write_gguf, write_vocabulary
from rankfold import load_base
from rankfold.models.base.find import find_base
from rankfold.models.base.text_side import text_side
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tokenizer import end_ids, gguf_tokenizer, special_ids
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all, template_of


def words(**changes):
    """The tiny vocabulary with other words in the place of some: ``{place: word}`` and keys."""
    own = vocabulary()
    places = {int(key[1:]): changes.pop(key) for key in [*changes] if key[:1] == "t" and key[1:].isdigit()}
    own["tokens"] = [places.get(place, word) for place, word in enumerate(own["tokens"])]
    return own | changes


def tokenizer_of(tmp_path, keys=None, **changes):
    return gguf_tokenizer(read_gguf(write_vocabulary(tmp_path / "a.gguf", words(**changes), **(keys or {}))))


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (True, True), (False, True)])
def test_beginning_and_end_are_put_around_as_the_file_says(before, after, tmp_path):
    tokenizer = tokenizer_of(tmp_path, add_bos_token=before, add_eos_token=after)
    ids = tokenizer("Hi")["input_ids"]
    assert ids == [
        *([256] if before else []),
        *tokenizer("Hi", add_special_tokens=False)["input_ids"],
        *([257] if after else []),
    ]


def test_a_splitting_may_begin_texts_by_itself_and_the_file_may_forbid_it(tmp_path):
    assert tokenizer_of(tmp_path, pre="llama-bpe")("Hi")["input_ids"][0] == 256
    assert tokenizer_of(tmp_path, pre="llama-bpe", add_bos_token=False)("Hi")["input_ids"][0] != 256
    assert tokenizer_of(tmp_path, pre="glm4").bos_token is None


def test_control_tokens_are_cut_out_and_added_words_stay_words(tmp_path):
    types = vocabulary()["token_type"]
    tokenizer = tokenizer_of(
        tmp_path, t260="<think>", token_type=[4 if place == 260 else kind for place, kind in enumerate(types)]
    )
    assert tokenizer("<think><|im_end|>")["input_ids"] == [260, 259]
    assert tokenizer("<think><|im_end|>", split_special_tokens=True)["input_ids"][0] == 260
    assert tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"] != [259]
    assert tokenizer.decode([260, 259], skip_special_tokens=True) == "<think>"
    assert "<think>" not in prompt_encoder(tokenizer).control


def test_every_token_that_ends_an_answer_stops_it(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        tiny_model("llama"),
        "llama",
        words=words(t260="<|eom_id|>", t261="[EOT]", eot_token_id=259, eom_token_id=260),
    )
    assert end_ids(read_gguf(path)) == [257, 259, 260, 261]
    base = load_base(str(path))
    assert base.model.config.eos_token_id == base.model.generation_config.eos_token_id == [257, 259, 260, 261]


def test_a_message_of_harmony_ends_no_answer(tmp_path):
    file = read_gguf(
        write_vocabulary(
            tmp_path / "a.gguf", words(t258="<|end|>", t259="<|return|>", t260="<|call|>", t261="<|channel|>")
        )
    )
    assert end_ids(file) == [257, 259, 260]
    assert "<|channel|>" not in prompt_encoder(gguf_tokenizer(file)).control


def test_types_of_tokens_that_are_not_there_do_not_matter(tmp_path):
    types = vocabulary()["token_type"]
    assert (
        tokenizer_of(tmp_path, token_type=[*types, 3, 3])("the")["input_ids"]
        == tokenizer_of(tmp_path)("the")["input_ids"]
    )


def test_several_templates_are_read_by_their_names(tmp_path):
    plain, tools = "{{ messages[0].content }}", "{{ tools|length }} tools"
    keys = {
        "tokenizer.chat_template": plain,
        "tokenizer.chat_template.tool_use": tools,
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = tokenizer_of(tmp_path, keys)
    assert template_of(tokenizer) == ("", plain)
    assert template_of(tokenizer, tools=True) == ("", tools)
    asked = Conversation([{"role": "user", "content": "Hi"}], [(1, True)], [{"type": "function"}])
    [[rendered]] = render_all(tokenizer, [asked])
    assert rendered.text == "1 tools"
    assert tokenizer_of(tmp_path, {"tokenizer.chat_template": plain}).chat_template == plain
    assert tokenizer_of(tmp_path).chat_template is None


def test_what_is_kept_for_next_time_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    template = {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b"}
    path = write_gguf(
        tmp_path / "a.gguf",
        tiny_model("gemma3"),
        "gemma3",
        words=words(pre="tekken", add_eos_token=True),
        keys=template,
    )
    first, again = (text_side(find_base(str(path))) for _ in range(2))
    assert [folder.name[:2] for folder in (tmp_path / "cache" / "gguf").iterdir()] == ["1-"]
    assert again.tokenizer is not first.tokenizer
    assert again.tokenizer.chat_template == first.tokenizer.chat_template == {"default": "a", "rag": "b"}
    assert (
        again.tokenizer("Hi 12 <|im_end|>")["input_ids"] == first.tokenizer("Hi 12 <|im_end|>")["input_ids"]
    )
    assert again.config.to_dict() | {"_name_or_path": ""} == first.config.to_dict()
    assert special_ids(again.tokenizer, read_gguf(path)) == special_ids(first.tokenizer, read_gguf(path))
    for text in ("a", " 12  b", "<s>"):
        assert again.tokenizer.decode(again.tokenizer(text)["input_ids"]) == first.tokenizer.decode(
            first.tokenizer(text)["input_ids"]
        )
