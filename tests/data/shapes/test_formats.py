from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GSM8K, needs_gsm8k
from rankfold.data.reading.rows import Row, read_rows
from rankfold.data.shapes.convert import refuse_untrainable, to_examples
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.formats import SHAPES, detect_shape, to_example
from rankfold.data.shapes.rules import problems
from rankfold.errors import DataError


def rows(*values) -> list[Row]:
    return [Row(value, f"f.jsonl:{line}") for line, value in enumerate(values, start=1)]


def turn(role: str, content: str = "x") -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompt_and_completion_become_two_turns():
    examples, style, shape = to_examples(rows({"prompt": "p", "completion": "c", "language": "en"}))
    assert examples[0].messages == (Message("user", ("p",)), Message("assistant", ("c",)))
    assert (style, shape) == (
        "chat",
        "1 rows of prompt-completion (columns prompt, completion); not used: language",
    )
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
        ({"prompt": {"a": 1}, "completion": "c"}, "'prompt' must be text or a list of messages, got dict"),
        ({"jokes": "  \n"}, "the text is empty"),
        ({"jokes": ["a"]}, "'jokes' must be text, got list"),
        ({"jokes": "\ud800"}, "surrogate"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [turn("user")]}, "the last message is the user's"),
        ({"messages": [turn("assistant")]}, "nothing stands before the only answer"),
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


def test_columns_are_named_in_one_line():
    row = rows({"task": "p", "reply": "c", "note": "n"})
    examples, style, shape = to_examples(row, "prompt=task, completion=reply")
    assert examples[0].messages == (Message("user", ("p",)), Message("assistant", ("c",)))
    assert (style, shape) == ("chat", "1 rows of prompt-completion (as given); not used: note")
    assert to_examples(row, "text=note")[0][0].text == "n"


def test_a_shapes_name_overrides_what_the_columns_tell():
    row = rows({"text": "words", "label": "good"})
    assert to_examples(row)[1] == "chat"
    assert to_examples(row, "text")[0][0].text == "words"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("alpacca", r"no shape 'alpacca' \(did you mean 'alpaca'\?\); known are preference,"),
        ("prompt=a", r"no shape has just the fields prompt; shapes need:(.|\n)*prompt, completion"),
        ("promt=a,completion=b", "no shape has just the fields promt, completion"),
        ("prompt=a,completion=", "must name each field once"),
        ("text=a,text=b", "must name each field once"),
        ("prompt=a,completion", "must name each field once"),
        (
            "prompt=nope,completion=completion",
            r"f.jsonl:1: no column 'nope'; the row has \['completion', 'prompt'\]",
        ),
        ("alpaca", "f.jsonl:1: no 'instruction' for alpaca"),
    ],
)
def test_an_override_that_cannot_be_meant_is_explained(shape, message):
    with pytest.raises(DataError, match=message):
        to_examples(rows({"prompt": "p", "completion": "c"}), shape)


def test_rows_of_several_shapes_are_counted_with_their_reasons():
    mixed = rows(
        {"prompt": "p", "completion": "c"}, {"question": "q", "answer": "a"}, {"prompt": "p", "response": "c"}
    )
    assert to_examples(mixed)[2] == (
        "1 rows of prompt-completion (columns prompt, completion); "
        "1 rows of prompt-completion (columns question, answer); "
        "1 rows of prompt-completion (columns prompt, response)"
    )


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="there are no rows to train on"):
        to_examples([])


def test_pairs_and_judged_answers_are_refused_by_a_supervised_run_with_the_way_out():
    pairs, _, _ = to_examples(rows({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match=r"f.jsonl:1: the rows are preference pairs.*give the shape 'chosen'"):
        refuse_untrainable(pairs)
    judged, _, _ = to_examples(rows({"prompt": "p", "completion": "a", "label": True}))
    with pytest.raises(DataError, match=r"judged answers \(KTO\).*prompt=COLUMN,completion=COLUMN"):
        refuse_untrainable(judged)
    refuse_untrainable(to_examples(rows({"prompt": "p", "chosen": "a", "rejected": "b"}), "chosen")[0])


def test_pictures_are_refused_by_a_run_on_text():
    turns = (Message("user", (Image(Path("a.png")), "What?")), Message("assistant", ("A cat.",)))
    with pytest.raises(DataError, match="f:1: the row has pictures"):
        refuse_untrainable([Example("f:1", turns)])


column_names = st.sampled_from(
    [c for shape in SHAPES.values() for names in shape.needs.values() for c in names]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(["user", "assistant", "human", "[{}]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(column_names | st.text(max_size=3), json_values, max_size=4))
def test_any_row_becomes_an_example_or_a_problem_in_words(values):
    (row,) = rows(values)
    try:
        example = to_example(row, detect_shape(values))
        told = [problem.text for problem in problems(example)]
        assert example.kind == "text" or example.messages
    except ValueError as error:
        told = [str(error)]
    assert all(told)


@needs_gsm8k
def test_gsm8k_is_understood_as_it_is():
    examples, style, shape = to_examples(read_rows(GSM8K))
    assert (len(examples), style) == (1319, "chat")
    assert shape == "1,319 rows of prompt-completion (columns question, answer)"


def test_only_a_few_unused_columns_are_named():
    wide = rows({"text": "x", **{f"column {number}": number for number in range(10, 30)}})
    assert to_examples(wide)[2].endswith("column 16, column 17 and 12 more")
