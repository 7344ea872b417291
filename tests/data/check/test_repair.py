from __future__ import annotations

import copy
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.check.repair import repaired


def chat(*turns: tuple[str, str | None]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


Q, A = ("user", "q"), ("assistant", "a")


@pytest.mark.parametrize(
    ("given_turns", "left", "done"),
    [
        ([Q, A], [Q, A], []),
        (
            [("User ", "q"), ("Assistant", "a")],
            [Q, A],
            ["role 'User ' written 'user'", "role 'Assistant' written"],
        ),
        ([("human", "q"), ("gpt", "a")], [Q, A], ["role 'human' written 'user'", "role 'gpt' written"]),
        ([Q, A, ("user", "more")], [Q, A], ["user turn after the last answer dropped"]),
        ([("assistant", "hello"), Q, A], [Q, A], ["answer before the first question dropped"]),
        ([("system", " "), Q, A], [Q, A], ["empty system turn dropped"]),
        ([Q, ("user", "r"), A], [("user", "q\n\nr"), A], ["user turns in a row joined"]),
        (
            [Q, ("assistant", ""), ("user", "r"), A],
            [("user", "r"), A],
            ["empty answer dropped, and its question"],
        ),
        (
            [("user", None), ("assistant", "x"), Q, A],
            [Q, A],
            ["empty user turn dropped", "answer without a question dropped"],
        ),
        (
            [("user", "cafÃ©\x00"), A],
            [("user", "café"), A],
            ["read as UTF-8 again: 1", "control characters removed"],
        ),
    ],
)
def test_what_can_be_mended_is_and_is_told(given_turns, left, done):
    values, told = repaired(chat(*given_turns))
    assert values == chat(*left)
    assert len(told) == len(done)
    assert all(one.startswith(start) for one, start in zip(told, done, strict=True))


def test_sharegpt_names_are_no_mistake():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert repaired(row)[1] == []


def test_tool_turns_and_unknown_roles_are_left_alone():
    row = chat(Q, ("assistant", ""), ("tool", "4"), A)
    assert repaired(row) == (row, [])
    row = chat(("narrator", "x"), Q, A, Q)
    assert repaired(row) == (row, [])


def test_a_turn_with_a_tool_call_is_not_empty():
    row = chat(Q, ("assistant", None), A)
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    assert repaired(row) == (row, [])


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"messages": "hi"}, {"messages": [1]}, {"messages": [{}]}, {}]
)
def test_rows_of_other_shapes_stay_as_they_are(row):
    assert repaired(row) == (row, [])


TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.sampled_from(["", "  ", None, "x", "y"])),
    max_size=8,
)


@given(TURNS)
def test_mending_is_done_at_once_and_leaves_its_input_alone(turns):
    row = chat(*turns)
    before = copy.deepcopy(row)
    once, _ = repaired(row)
    assert row == before
    assert repaired(once)[0] == once


@given(TURNS)
def test_no_answer_is_put_behind_another_question_than_its_own(turns):
    numbered = [
        (role, content and content.strip() and f"{content}{place}")
        for place, (role, content) in enumerate(turns)
    ]
    values, _ = repaired(chat(*numbered))
    spoken = [(turn["role"], turn["content"]) for turn in values["messages"]]
    for (role, content), (next_role, answer) in pairwise(spoken):
        if role == "user" and next_role == "assistant" and content and answer:
            last_question = int(content.strip()[-1])
            first_answer = int(answer.split("\n")[0].strip()[-1])
            between = numbered[last_question + 1 : first_answer]
            assert not any(other == "user" for other, _ in between)
