from __future__ import annotations

import pytest

from rankfold.data.example import Message
from rankfold.data.formats import to_examples
from rankfold.data.rows import Row
from rankfold.errors import DataError


def rows(*values) -> list[Row]:
    return [Row(value, f"f.jsonl:{line}") for line, value in enumerate(values, start=1)]


def turn(role: str, content: str = "x") -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompt_and_completion_become_two_turns():
    examples, style, shape = to_examples(rows({"prompt": "p", "completion": "c", "language": "en"}))
    assert examples[0].messages == (Message("user", ("p",)), Message("assistant", ("c",)))
    assert (style, shape) == ("chat", "1 rows of prompt-completion (columns prompt, completion)")
    assert examples[0].prompt == [turn("user", "p")]
    assert examples[0].answer == "c"


def test_messages_stay_as_they_are():
    messages = [turn("system"), turn("user"), turn("assistant"), turn("user"), turn("assistant", "y")]
    examples, style, _ = to_examples(rows({"messages": messages}))
    assert [message.for_template() for message in examples[0].messages] == messages
    assert style == "chat"


@pytest.mark.parametrize("row", [{"jokes": "ha ha"}, {"text": "ha ha", "id": 7}])
def test_a_single_text_column_of_any_name_is_running_text(row):
    examples, style, _ = to_examples(rows(row))
    assert (examples[0].text, style) == ("ha ha", "plain")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"no shape fits the columns \[\]"),
        ({"a": "x", "b": "y"}, r"no shape fits the columns \['a', 'b'\]"),
        ({"prompt": "p"}, "'completion' is missing"),
        ({"completion": "p"}, "'prompt' is missing"),
        ({"prompt": "p", "completion": ""}, r"message 2 \(assistant\): empty"),
        ({"prompt": "p", "completion": None}, r"message 2 \(assistant\): the content is missing or null"),
        ({"prompt": 3, "completion": "c"}, "'prompt' must be text or a list of messages, got int"),
        ({"jokes": "  \n"}, "the text is empty"),
        ({"jokes": ["a"]}, "'jokes' must be text, got list"),
        ({"jokes": "\ud800"}, "surrogate"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [turn("user")]}, "the last message is the user's"),
        ({"messages": [turn("assistant"), turn("user")]}, "message 1 is the assistant's at the start"),
        (
            {"messages": [turn("user"), turn("user"), turn("assistant")]},
            "message 2 is the user's after the user",
        ),
        ({"messages": [turn("narrator"), turn("assistant")]}, "unknown role 'narrator'"),
        (
            {"messages": [turn("user"), {"role": "assistant"}]},
            r"message 2 \(assistant\): the content is missing",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(row, message):
    with pytest.raises(DataError, match=rf"f.jsonl:2: .*{message}"):
        to_examples(rows({"prompt": "p", "completion": "c"}, row))


def test_all_bad_rows_are_told_at_once():
    with pytest.raises(DataError, match=r"2 problems(.|\n)*f.jsonl:1(.|\n)*f.jsonl:3"):
        to_examples(rows({}, {"prompt": "p", "completion": "c"}, {"prompt": "p"}))


def test_text_beside_messages_is_refused():
    with pytest.raises(DataError, match="split the file"):
        to_examples(rows({"text": "x"}, {"prompt": "p", "completion": "c"}))
