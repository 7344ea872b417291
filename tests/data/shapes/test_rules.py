from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.rules import MAX_TURNS, RULES, Problem, problems

CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {}}}


def chat(*turns: tuple[str, str] | Message, **fields) -> Example:
    messages = [turn if isinstance(turn, Message) else Message(turn[0], (turn[1],)) for turn in turns]
    return Example("f:1", tuple(messages), **fields)


U, A, S, T = ("user", "x"), ("assistant", "y"), ("system", "z"), ("tool", "3")
CALLS = Message("assistant", ("",), tool_calls=(CALL,))
TWO_CALLS = Message("assistant", ("",), tool_calls=(CALL, {**CALL, "id": "2"}))
OFFER = ({"type": "function", "function": {"name": "subtract"}},)

KEPT = [
    chat(U, A),
    chat(S, U, A, U, A),
    chat(U, CALLS, T, A),
    chat(U, CALLS, Message("tool", ("3",), tool_call_id="1"), A, U, A),
    chat(U, TWO_CALLS, T, T, CALLS, T, A),
    chat(U, CALLS),
    chat(U, CALLS, Message("tool", ("",)), A),
    chat(U, A, rejected=(Message("assistant", ("n",)),)),
    Example("f:1", text="words"),
]
BROKEN = [
    (chat(A, U, A), "role-order", "message 1 is the assistant's at the start, where the system or user's is"),
    (chat(A), "nothing-trained", "nothing stands before the only answer"),
    (chat(U, U, A), "role-order", "message 2 is the user's after the user, where the assistant's is usual"),
    (chat(U, A, A), "role-order", "message 3 is the assistant's after the assistant"),
    (chat(U, S, A), "role-order", "message 2 is the system's after the user"),
    (chat(S, S, U, A), "role-order", "message 2 is the system's after the system"),
    (chat(S, A), "role-order", "message 2 is the assistant's after the system"),
    (chat(U, T, A), "role-order", "message 2 is the tool's after the user"),
    (
        chat(U, CALLS, U, A),
        "role-order",
        "message 3 is the user's after the tool call, where the tool's is usual",
    ),
    (chat(U), "last-is-answer", "the last message is the user's"),
    (chat(U, CALLS, T), "last-is-answer", "the last message is the tool's"),
    (chat(U, Message("assistant", ("y",), weight=0.5)), "loss-weight", "message 2: the loss of each of its"),
    (chat(U, A, rejected=(Message("user", ("n",)),)), "last-is-answer", "in the rejected answer, the last"),
    (chat(("narrator", "x"), U, A), "unknown-role", "unknown role 'narrator'; known are system, user"),
    (
        chat(U, Message("assistant", ())),
        "null-content",
        r"message 2 \(assistant\): the content is missing or null",
    ),
    (chat(U, ("assistant", " \n")), "empty-turn", r"message 2 \(assistant\): empty"),
    (chat(("user", ""), A), "empty-turn", r"message 1 \(user\): empty"),
    (chat(U, A, rejected=(Message("assistant", ("",)),)), "empty-turn", "in the rejected answer, message 1"),
    (chat(("system", ""), U, A), "empty-system", "the system message is empty"),
    (Example("f:1", text=" \n"), "empty-text", "the text is empty"),
    (chat(Message("user", (Image(Path("/no/a.png")), "x")), A), "missing-image", "no such image: /no/a.png"),
    (chat(("user", "<image> x"), A), "image-count", "1 <image> marks in the text, but 0 images"),
    (chat(("user", "<video>x"), A), "media-mark", "speaks of <video>, which nothing here sees"),
    (chat(U, TWO_CALLS, T, A), "tool-results", "message 2 makes 2 tool calls, but 1 results follow"),
    (
        chat(U, CALLS, Message("tool", ("3",), tool_call_id="9"), A),
        "tool-results",
        r"message 3 answers '9', but the calls are \['1'\]",
    ),
    (chat(U, CALLS, T, A, tools=OFFER), "unknown-tool", "calls of tools that are not on offer: add"),
    (chat(U, Message("assistant", ("y",), train=False)), "nothing-trained", "all their train flags are off"),
    (chat(U, A, rejected=(Message("assistant", ("y",)),)), "same-answers", "are the same"),
    (chat(*[U, A] * MAX_TURNS), "too-many-turns", "4,000 messages, more than 2,000"),
]


@pytest.mark.parametrize("example", KEPT)
def test_a_sound_example_breaks_no_rule(example):
    assert problems(example) == []


@pytest.mark.parametrize(("example", "rule", "text"), BROKEN)
def test_a_broken_rule_is_told_by_name(example, rule, text):
    found = [problem for problem in problems(example) if problem.rule == rule]
    assert len(found) == 1
    assert re.search(text, found[0].text)


def test_every_rule_is_held_by_an_example():
    assert {rule for _, rule, _ in BROKEN} == {rule.name for rule in RULES}


def test_several_problems_of_one_example_are_all_told():
    found = problems(chat(("narrator", ""), ("user", "")))
    assert [problem.rule for problem in found] == ["unknown-role", "last-is-answer", "empty-turn"]
    assert found[0] == Problem("unknown-role", found[0].text, True)


@given(st.lists(st.sampled_from([U, A, S]), max_size=7))
def test_plain_chats_can_be_trained_on_exactly_if_they_end_with_an_answer_to_something(turns):
    found = problems(chat(*turns))
    sound = len(turns) > 1 and turns[-1] == A
    assert (not [problem for problem in found if problem.fatal]) == sound or not turns
    roles = "".join(role[0] for role, _ in turns).removeprefix("s")
    alternate = roles == ("ua" * len(roles))[: len(roles)]
    assert ("role-order" not in [problem.rule for problem in found]) == alternate
