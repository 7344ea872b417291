"""An assistant's turn in a rendered conversation: where it begins, and which token ends it."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from rankfold.errors import DataError
from rankfold.models.messages.prompt import PromptEncoder, TemplateMessage, squeeze
from rankfold.models.messages.template import Conversation, Rendering, render_all


def reply_of(before: Rendering, after: Rendering, spelling: re.Pattern[str]) -> tuple[str, str]:
    """The prompt, and what the template writes for the turn that answers it.

    ``before`` is the conversation up to where the assistant begins to speak, ``after`` the same with the
    turn.  Where a template opens a reply differently from how it writes one down, its ``{% generation %}``
    marks tell where the words begin; without marks DataError is raised."""
    if after.text.startswith(before.text):
        return before.text, after.text[len(before.text) :]
    same = 0
    while same < min(len(before.text), len(after.text)) and before.text[same] == after.text[same]:
        same += 1
    if (
        after.marked is not None
    ):  # marks may take in the token that opens the turn, which is none of the words
        opened = max((found.end() for found in spelling.finditer(after.text, 0, same)), default=0)
        start = max(after.marked[0], opened)
        return after.text[:start], after.text[start:]
    raise DataError(
        f"the chat template opens a reply with {before.text[same:][:40]!r} but writes one down with "
        f"{after.text[same:][:40]!r}, so the model would be trained on what it is never asked; "
        "use a template that marks replies with {% generation %}"
    )


@dataclass(frozen=True, slots=True)
class Form:
    """How a tokenizer's template writes an assistant's turn, learnt from one with words of our own.

    ``openings``: what can stand before the words, without white space.  ``stop_ids``: the tokens that end an
    answer, which are the tokenizer's end of text and what the template ends a turn with."""

    openings: frozenset[str]
    stop_ids: frozenset[int]


def turn_form(encoder: PromptEncoder) -> Form:
    """The form of ``encoder``'s template; one that refuses our words has the tokenizer's stop token alone."""
    openings, stops = {""}, {encoder.tokenizer.eos_token_id} - {None}
    for thought in ("", "three"):
        answer = {"role": "assistant", "content": "two"} | ({"reasoning_content": thought} if thought else {})
        probe = Conversation([{"role": "user", "content": "one"}, answer], [(1, True), (2, False)])
        [rendered] = render_all(encoder.tokenizer, [probe])
        with suppress(DataError):
            if isinstance(rendered, DataError):
                raise rendered
            before, after = rendered
            _, reply = reply_of(before, after, encoder.spelling)
            spoken, stop = cut_turn(reply, answer, encoder.spelling)
            openings.add(opening_of(spoken, answer))
            stops.add(encoder.control[stop])
    return Form(frozenset(openings), frozenset(stops))


def cut_turn(reply: str, message: TemplateMessage, spelling: re.Pattern[str]) -> tuple[str, str]:
    """The words of a turn as the template writes them, and the token that ends it.

    A plain turn ends with the first control token after its words; they spell none themselves, so they lie
    between two of them.  One with tool calls ends with the last control token.  Raises DataError if the
    words are not there as they were said, or if no control token follows them."""
    parts = spelling.split(reply)  # text, token, text, token, ..., text
    if missing := _lost(message, squeeze(reply)):
        raise DataError(f"the chat template leaves out {missing}")
    words = squeeze(message["content"])
    holding = [place for place in range(0, len(parts), 2) if words in squeeze(parts[place])]
    if not holding:
        raise DataError("the chat template changes the assistant's words")
    place = len(parts) - 3 if message.get("tool_calls") else holding[-1]
    if not 0 <= place < len(parts) - 1:
        raise DataError("the chat template ends the assistant's turn without a stop token to learn")
    if message.get("tool_calls"):
        if squeeze(parts[-1]):
            raise DataError("the chat template ends the assistant's turn without a stop token to learn")
    elif not squeeze(parts[place]).endswith(words):
        raise DataError("the chat template writes more words after the assistant's")
    return "".join(parts[: place + 1]), parts[place + 1]


def opening_of(spoken: str, message: TemplateMessage) -> str:
    """What the template writes into a plain turn before its words and beside its reasoning."""
    opening = squeeze(spoken).removesuffix(squeeze(message["content"]))
    return opening.replace(squeeze(message.get("reasoning_content", "")), "", 1)


def _lost(message: TemplateMessage, written: str) -> str:
    """Which part of a turn is missing from what the template wrote for it; empty if none."""
    if squeeze(message.get("reasoning_content", "")) not in written:
        return "the reasoning"
    for call in message.get("tool_calls", ()):
        name = str(call.get("function", call).get("name", ""))
        if squeeze(name) not in written:
            return f"the call of the tool {name!r}"
    return ""
