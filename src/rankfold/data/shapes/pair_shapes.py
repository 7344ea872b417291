"""Shapes of rows that judge answers: preference pairs, and single answers called good or bad."""

from __future__ import annotations

import re
from dataclasses import replace

from rankfold.data.reading.row import Row
from rankfold.data.shapes.chat_shapes import asked_and_answered, chat, from_turns
from rankfold.data.shapes.column_names import ANSWER_NAMES, BESIDE, PROMPT_NAMES
from rankfold.data.shapes.example import Example, Message
from rankfold.data.shapes.fields import Values, described, text_of, truth_of
from rankfold.data.shapes.shape import Columns, Shape
from rankfold.data.shapes.turns import conversation, messages_of

HUMAN_TURNS = re.compile(r"\n\n(Human|Assistant): ?")


def from_pair(row: Row, columns: Columns) -> Example:
    """The prompt with the chosen answer, and the rejected one beside it.

    The prompt stands in a column of its own, or is what chosen and rejected share: their first messages,
    or the turns before the last in Anthropic's ``Human:`` and ``Assistant:`` text."""
    chosen = _answers(row, columns["chosen"])
    rejected = _answers(row, columns["rejected"])
    shared = _shared(chosen, rejected)
    prompt = _prompt(row, columns)
    if prompt and shared and shared[-len(prompt) :] != prompt:
        raise ValueError("the prompt is not what chosen and rejected begin with")
    before = shared or prompt
    if not before:
        raise ValueError("no prompt: neither a column of its own, nor turns that chosen and rejected share")
    example = chat(row, columns, [*before, *chosen[len(shared) :]])
    return replace(example, rejected=tuple(rejected[len(shared) :]))


def from_chosen(row: Row, columns: Columns) -> Example:
    """The pair without its rejected answer: a chat."""
    return replace(from_pair(row, columns), rejected=())


def _prompt(row: Row, columns: Columns) -> list[Message]:
    prompt = conversation(row.values, columns["prompt"], row.folder) if "prompt" in columns else []
    more = text_of(row.values, columns["input"]) if "input" in columns else None
    if prompt and more and more.strip():
        prompt[-1] = Message(prompt[-1].role, (f"{prompt[-1].text}\n{more}",))
    return prompt


def _answers(row: Row, key: str) -> list[Message]:
    """The turns at ``key``: a list of them, one, a text with Anthropic's marks, or a text."""
    value = row.values.get(key)
    if isinstance(value, dict):
        return messages_of([value], row.folder)
    if isinstance(value, list):
        return conversation(row.values, key, row.folder)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be text or messages, got {described(value)}")
    text = text_of(row.values, key)
    if text is not None and HUMAN_TURNS.match(text):
        _, *pieces = HUMAN_TURNS.split(text)
        return [
            Message("user" if who == "Human" else "assistant", (said,))
            for who, said in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    return [Message("assistant", () if text is None else (text,))]


def _shared(one: list[Message], other: list[Message]) -> list[Message]:
    """The messages that both begin with; each keeps at least its last."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return one[:count]


def from_judged(row: Row, columns: Columns) -> Example:
    """A prompt, an answer, and whether it is a good one."""
    example = chat(row, columns, asked_and_answered(row, columns))
    return replace(example, desirable=truth_of(row.values, columns["label"]))


def from_judged_turns(row: Row, columns: Columns) -> Example:
    return replace(from_turns(row, columns), desirable=truth_of(row.values, columns["label"]))


def _is_judgement(values: Values, columns: Columns) -> bool:
    value = values[columns["label"]]
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


PAIR_NEEDS = {
    "chosen": ("chosen", "chosen_messages", "chosen_response", "preferred"),
    "rejected": (
        "rejected",
        "rejected_messages",
        "rejected_response",
        "dispreferred",
        "non_preferred_output",
    ),
}
PAIR_MAY = {
    "prompt": ("prompt", "question", "query", "instruction", "messages", "conversations", "input"),
    "input": ("input",),
    **BESIDE,
}
PAIRS = {
    "preference": Shape(
        "preference", "preference pairs: a chosen and a rejected answer", PAIR_NEEDS, from_pair, PAIR_MAY
    ),
    "kto": Shape(
        "kto",
        "KTO's rows: a prompt, a completion, and whether it is a good one",
        {"prompt": PROMPT_NAMES, "completion": ANSWER_NAMES, "label": ("label", "desirable")},
        from_judged,
        {"history": ("history",), **BESIDE},
        accepts=_is_judgement,
    ),
    "kto-messages": Shape(
        "kto-messages",
        "KTO's rows: messages, and whether the last is a good one",
        {"messages": ("messages", "conversations"), "label": ("label", "desirable")},
        from_judged_turns,
        BESIDE,
        accepts=_is_judgement,
    ),
}
# Used only where the user names it: rejected answers are left out then.
CHOSEN = {
    "chosen": Shape(
        "chosen", "the chosen answers of preference pairs, as chats", PAIR_NEEDS, from_chosen, PAIR_MAY
    )
}
