"""Calls of tools in an answer, as the model's own template writes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rankfold.errors import DataError
from rankfold.models.answering.streaming import words
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all

NAME, KEY, VALUE = "name_of_a_tool", "key_of_it", "value_of_it"
PROBE = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class CallForm:
    """``opening`` stands before each call, which is JSON with the tool's name under ``name_key`` and what it
    is given under ``arguments_key``."""

    opening: str
    closing: str
    name_key: str
    arguments_key: str

    def read(self, text: str, known: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
        """The words of an answer, and the calls of ``known`` tools in it as OpenAI's clients get them."""
        if not self.opening:
            found = _json_at(text, 0) if text[:1] in ("{", "[") else None
            calls = found[0] if found is not None and isinstance(found[0], list) else [found and found[0]]
            read = [self._call(call, known) for call in calls]
            return ("", [call for call in read if call]) if all(read) else (text, [])
        before, *rest = text.split(self.opening)
        read = [self._call(found[0], known) if (found := _json_at(part, 0)) else None for part in rest]
        return (before.strip(), [call for call in read if call]) if read and all(read) else (text, [])

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

    def _call(self, found: Any, known: Collection[str]) -> dict[str, Any] | None:
        if not isinstance(found, dict) or found.get(self.name_key) not in known:
            return None
        arguments = found.get(self.arguments_key, {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": found[self.name_key], "arguments": written}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def call_form(tokenizer: Any) -> CallForm | None:
    """The form in which the template of ``tokenizer`` writes a call down; None if it writes none as JSON."""
    encoder = prompt_encoder(tokenizer)
    probe = Conversation([{"role": "user", "content": "one"}, PROBE], [(1, True), (2, False)], [TOOL])
    [rendered] = render_all(tokenizer, [probe])
    if isinstance(rendered, DataError):
        return None
    before, after = rendered
    begin = len(before.text) if after.text.startswith(before.text) else max(0, after.text.rfind("one"))
    reply = after.text[begin:]
    for place in (place for place, mark in enumerate(reply) if mark == "{"):
        found = _json_at(reply, place)
        if found is None or not isinstance(found[0], dict) or NAME not in found[0].values():
            continue
        call, end = found
        name_key = next(key for key, value in call.items() if value == NAME)
        arguments_key = next((key for key, value in call.items() if value == {KEY: VALUE}), "arguments")
        opening, closing = (
            words(tokenizer, encoder.ids_now(encoder.cut(part))) for part in (reply[:place], reply[end:])
        )
        return CallForm(opening.strip().removesuffix("["), closing.strip(), name_key, arguments_key)
    return None


def _json_at(text: str, place: int) -> tuple[Any, int] | None:
    try:
        start = place + len(text[place:]) - len(text[place:].lstrip())
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
