"""Calls of tools in an answer, as the model's own template writes them.

Nothing is known of any model: a template is shown calls of our own, and what it makes of them is the form."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankfold.errors import DataError
from rankfold.models.answering.shared_prefix import common
from rankfold.models.answering.streaming import words
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all

NAME, KEYS, VALUES = "name_of_a_tool", ("first_key", "second_key"), ("first_value", "second_value")
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in KEYS}},
    },
}
THOUGHT = "</think>"  # ends what a model thinks before it speaks
TAG = re.compile(r"\s*(<[^>]*>|\S+)")
Tools = Mapping[str, Mapping[str, Any]]  # the schema of what each is given, by its name
Call = tuple[str, Any]  # a tool's name and what it is given


@dataclass(frozen=True, slots=True)
class CallForm:
    """``opening`` stands before each call, or nothing where an answer is a call or none."""

    opening: str

    def read(self, text: str, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
        """The words of an answer, and its calls of ``tools`` as OpenAI's clients get them.  An answer with a
        call that cannot be read is words alone."""
        before, *rest = text.split(self.opening) if self.opening else ("", text)
        calls = [call for part in rest for call in self.calls(part.strip(), tools) or [("", None)]]
        if not calls or any(name not in tools for name, _ in calls):
            return text, []
        return before.strip(), [_as_openai(*call) for call in calls]

    def calls(self, text: str, tools: Tools) -> list[Call]:
        """The calls with which ``text`` begins."""
        raise NotImplementedError

    def may_begin(self, text: str) -> int | None:
        """Where in an answer that still comes a call begins or may begin; None if nowhere."""
        if not self.opening:
            return 0 if text[:1] in ("{", "[") else None
        place = text.find(self.opening)
        if place >= 0:
            return place
        begun = (n for n in range(len(self.opening) - 1, 0, -1) if text.endswith(self.opening[:n]))
        longest = next(begun, 0)
        return len(text) - longest if longest else None


@dataclass(frozen=True, slots=True)
class JsonForm(CallForm):
    """A call is JSON: the tool's name under ``name_key``, what it is given under ``arguments_key``."""

    name_key: str
    arguments_key: str

    def calls(self, text: str, tools: Tools) -> list[Call]:
        found = _json_at(text, 0) if text[:1] in ("{", "[") else None
        if found is None:
            return []
        read = found[0] if isinstance(found[0], list) else [found[0]]
        if not all(isinstance(each, dict) for each in read):
            return []
        return [(str(each.get(self.name_key)), each.get(self.arguments_key, {})) for each in read]


@dataclass(frozen=True, slots=True)
class SpeltForm(CallForm):
    """A call is the tool's name, ``head``, and for each key and value ``begin`` key ``middle`` value ``end``;
    ``tail`` ends it."""

    head: str
    begin: str
    middle: str
    end: str
    tail: str

    def calls(self, text: str, tools: Tools) -> list[Call]:
        name = next((each for each in tools if text.startswith(each + self.head.rstrip())), None)
        if name is None:
            return []
        whole, ending, _ = text[len(name) + len(self.head.rstrip()) :].partition(self.tail.strip() or "\0")
        if self.tail and not ending:
            return []
        begin, middle, end = (part.strip() for part in (self.begin, self.middle, self.end))
        pattern = f"{re.escape(begin)}(.*?){re.escape(middle)}(.*?){re.escape(end) or '$'}"
        known = tools[name].get("properties", {})
        pairs = re.findall(pattern, whole, re.DOTALL)
        return [(name, {key.strip(): _typed(value, known.get(key.strip(), {})) for key, value in pairs})]


def call_form(tokenizer: Any) -> CallForm | None:
    """The form in which the template of ``tokenizer`` writes a call down; None if that is not seen."""
    one, two = (_written(tokenizer, count) for count in (1, 2))
    if one is None or two is None:
        return None
    for place in (place for place, mark in enumerate(one) if mark == "{"):
        found = _json_at(one, place)
        if found is not None and isinstance(found[0], dict) and NAME in found[0].values():
            call, opening = found[0], _opening(one[:place])
            keys = {json.dumps(value): key for key, value in call.items()}
            return JsonForm(
                opening, keys[json.dumps(NAME)], keys.get(json.dumps({KEYS[0]: VALUES[0]}), "arguments")
            )
    return _spelt(one, two)


def _spelt(one: str, two: str) -> SpeltForm | None:
    """The form of a call that is no JSON, from those with one and with two keys."""
    order = (NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    places = [two.find(word) for word in order]
    if -1 in places or places != sorted(places) or not _opening(two[: places[0]]):
        return None
    between = [two[a + len(word) : b] for word, a, b in zip(order, places, places[1:], strict=False)]
    head, middle, again = between[0], between[1], between[2]
    same = common(head[::-1], again[::-1])
    begin = head[len(head) - same :]
    begin = begin[max(0, begin.find("<")) :]  # what may close a tag before it is no part of it
    end, tail = again.removesuffix(begin), two[places[-1] + len(order[-1]) :]
    if middle.strip() == "" or not tail.startswith(end):
        return None
    ending = TAG.match(tail.removeprefix(end))
    return SpeltForm(
        _opening(two[: places[0]]),
        head.removesuffix(begin),
        begin,
        middle,
        end,
        ending.group() if ending else "",
    )


def _written(tokenizer: Any, count: int) -> str | None:
    """What the template writes for a call with so many keys, without control tokens."""
    function = {"name": NAME, "arguments": dict(zip(KEYS[:count], VALUES[:count], strict=True))}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    probe = Conversation([{"role": "user", "content": "one"}, turn], [(1, True), (2, False)], [TOOL])
    [rendered] = render_all(tokenizer, [probe])
    if isinstance(rendered, DataError):
        return None
    before, after = rendered
    same = common(before.text, after.text)
    encoder = prompt_encoder(tokenizer)
    return words(tokenizer, encoder.ids_now(encoder.cut(after.text[same:])))


def _opening(text: str) -> str:
    """What stands before a call; not the thoughts before it, and not the list that it is in."""
    return text.rpartition(THOUGHT)[2].strip().removesuffix("[").rstrip()


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    """A value that was spelt out, as its schema has it."""
    value = value.removeprefix("\n").removesuffix("\n")
    if schema.get("type") in (None, "string"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _as_openai(name: str, given: Any) -> dict[str, Any]:
    written = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    function = {"name": name, "arguments": written}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _json_at(text: str, place: int) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
