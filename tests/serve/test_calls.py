"""Calls of tools in answers: the form that each template writes is the form that is read."""

from __future__ import annotations

import copy
import json

import pytest

from chat_formats import TRL
from rankfold.errors import DataError
from rankfold.models.answering.shared_prefix import common
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all
from rankfold.serve.calls import TOOL, call_form

TOOLS = {
    "weather": {
        "properties": {"city": {"type": "string"}, "days": {"type": "array"}, "where": {"type": "object"}}
    },
    "now": {"properties": {}},
}
ARGUMENTS = {"city": "Zürich", "days": [1, 2], "where": {"near": "the {lake}", "x": None}}


def written(tokenizer, calls):
    """What the template writes for a turn of calls, as an answer's text is decoded."""
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": c} for c in calls],
    }
    asked = Conversation([{"role": "user", "content": "one"}, turn], [(1, True), (2, False)], [TOOL])
    [rendered] = render_all(tokenizer, [asked])
    if isinstance(rendered, DataError):
        return None
    before, after = (each.text for each in rendered)
    encoder = prompt_encoder(tokenizer)
    ids = encoder.ids_now(encoder.cut(after[common(before, after) :]))
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture
def by(real_base):
    def make(path):
        tokenizer = copy.deepcopy(real_base.tokenizer)
        tokenizer.chat_template = path.read_text()
        return tokenizer

    return make


TEMPLATES = {
    path.stem: path
    for path in sorted(TRL.glob("*.jinja"))
    if "tool_calls" in path.read_text() and not path.stem.endswith("_training")
}
OFTEN = ("qwen2_5", "qwen3", "qwen3_6", "nemotron_3_nano", "glm4moe", "llama3_2", "gptoss", "deepseekv3")
NOT_READ = ("deepseek", "diffusion_gemma", "gemma4", "gptoss", "lfm2", "muse_glimmer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in TEMPLATES]
)
def test_calls_are_read_as_the_template_writes_them(name, by):
    form = call_form(by(TEMPLATES[name]))
    text = written(by(TEMPLATES[name]), [{"name": "weather", "arguments": ARGUMENTS}])
    if name.startswith(NOT_READ):
        assert form is None or form.read(text or "", TOOLS)[1] == []
        return
    words, [call] = form.read(text, TOOLS)
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert words.replace("<think>", "").replace("</think>", "").strip() == ""
    assert form.read(text, {"other": {}}) == (text, [])  # a tool that was not on offer is no call
    for plain in ("The weather is fine.", "weather", "", "{", "[1]", "{}", text[: len(text) // 3]):
        assert form.read(plain, TOOLS) == (plain, [])
    assert form.may_begin(f"Let me see. {text}"[: -len(text) + 1 or None]) is not None or not form.opening


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6", "nemotron_3_nano", "glm4moe"])
def test_several_calls_and_words_before_them_are_told_apart(name, by):
    tokenizer = by(TEMPLATES[name])
    calls = [{"name": "weather", "arguments": ARGUMENTS}, {"name": "now", "arguments": {}}]
    text = f"Let me see.\n{written(tokenizer, calls).replace('<think>', '').replace('</think>', '').strip()}"
    form = call_form(tokenizer)
    words, found = form.read(text, TOOLS)
    assert words == "Let me see."
    assert [call["function"]["name"] for call in found] == ["weather", "now"]
    assert json.loads(found[1]["function"]["arguments"]) == {}
    assert len({call["id"] for call in found}) == 2
