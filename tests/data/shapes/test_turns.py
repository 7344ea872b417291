from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankfold.data.shapes.example import Image, Message
from rankfold.data.shapes.turns import ROLES, image_of, messages_of, with_images

ADD = {"name": "add", "arguments": '{"a": 1}'}
ADDED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def message(turn: dict) -> Message:
    return messages_of([turn], "data")[0]


@pytest.mark.parametrize(("written", "role"), list(ROLES.items()))
def test_roles_are_understood_in_every_spelling(written, role):
    content = json.dumps(ADD) if written in ("function_call", "tool_call") else "x"
    assert message({"from": written, "value": content}).role == role
    assert message({"role": written.upper(), "content": content, "id": 1}).role == role


def test_an_unknown_role_stays_for_the_rules_to_tell():
    assert message({"role": "Narrator", "content": "x"}).role == "Narrator"


@pytest.mark.parametrize(
    ("flag", "train"), [({"train": True}, True), ({"weight": 0}, False), ({"loss": None}, None)]
)
def test_a_turn_may_say_whether_it_is_trained(flag, train):
    assert message({"role": "assistant", "content": "x", **flag}).train is train


def test_a_flag_between_yes_and_no_is_refused():
    with pytest.raises(ValueError, match="message 1: 'train' must be true or false, got 0.5"):
        message({"role": "assistant", "content": "x", "train": 0.5})


@pytest.mark.parametrize(
    "turn",
    [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": ADD}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"id": "1", "function": ADD}])},
    ],
)
def test_openai_tool_calls_are_parsed(turn):
    assert message(turn) == Message("assistant", ("",), tool_calls=({**ADDED, "id": "1"},))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": ADD},
        {"from": "function_call", "value": json.dumps(ADD)},
        {"from": "function_call", "value": json.dumps([{"name": "add", "arguments": {"a": 1}}])},
    ],
)
def test_older_and_sharegpt_calls_are_parsed(turn):
    assert message(turn).tool_calls == (ADDED,)


def test_what_stands_beside_the_content_is_kept():
    turn = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"}
    assert message(turn) == Message("tool", ("3",), tool_call_id="1", name="add")
    assert message({"role": "assistant", "content": "3", "reasoning_content": "hm"}).reasoning == "hm"


def test_a_content_of_parts_keeps_their_order():
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "What?"},
        {"type": "image", "image": "/b.png"},
        "plain",
    ]
    assert message({"role": "user", "content": parts}).parts == (
        Image(Path("data/a.png")),
        "What?",
        Image(Path("/b.png")),
        "plain",
    )


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"content": "x"}, r"'role' \(or 'from'\) must be text, got NoneType in \['content'\]"),
        ({"role": 3, "content": "x"}, "must be text, got int"),
        ({"from": "human", "value": {"a": 1}}, "'value' must be text, got dict"),
        ({"role": "user", "content": "\ud800"}, "'content' holds half of a surrogate pair"),
        (
            {"role": "user", "content": [{"type": "video", "video": "a"}]},
            "must be of type text or image, got 'video'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "a text part of 'content' has no text"),
        ({"role": "user", "content": [3]}, "must be of type text or image, got 'int'"),
        ({"role": "assistant", "tool_calls": [{"name": 3}]}, "a tool call must hold a function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "'arguments' is not",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "must be an object",
        ),
        ({"from": "function_call", "value": "add(1)"}, "'value' is not the JSON that belongs there"),
    ],
)
def test_a_turn_that_cannot_be_understood_is_named(turn, problem):
    with pytest.raises(ValueError, match=f"message 2: .*{problem}"):
        messages_of([{"role": "user", "content": "x"}, turn], "data")


def test_a_missing_content_gives_no_parts():
    assert message({"role": "user"}).parts == message({"role": "user", "content": None}).parts == ()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("https://x/a.png", "not a URL"),
        ("data:image/png;base64,AAAA", "not a URL"),
        ({"bytes": b"x", "path": "a.png"}, "bytes are in the row"),
        ({"path": None, "bytes": None}, "must be the path of a file"),
        ("", "must be the path of a file, got str"),
        (3, "must be the path of a file, got int"),
    ],
)
def test_what_is_no_path_of_an_image_is_refused(value, problem):
    with pytest.raises(ValueError, match=problem):
        image_of(value, "data")


def test_images_stand_where_their_marks_were():
    one, two = Image(Path("1")), Image(Path("2"))
    asked = [Message("user", ("<image>\nLeft, <image> right?",)), Message("assistant", ("Yes.",))]
    assert with_images(asked, [one, two])[0].parts == (one, "\nLeft, ", two, " right?")
    assert with_images(asked, [one, two])[1] == asked[1]


def test_without_marks_images_stand_before_the_first_words_of_the_user():
    asked = [Message("system", ("s",)), Message("user", ("u",), name="n"), Message("assistant", ("a",))]
    placed = with_images(asked, [Image(Path("1"))])
    assert placed[1] == Message("user", (Image(Path("1")), "u"), name="n")
    assert [placed[0], placed[2]] == [asked[0], asked[2]]


def test_marks_left_over_stay_in_the_text_and_images_left_over_are_refused():
    asked = [Message("user", ("<image><image>",))]
    assert with_images(asked, [Image(Path("1"))])[0].parts == (Image(Path("1")), "<image>")
    with pytest.raises(ValueError, match="3 images, but 2 <image> marks in the text"):
        with_images(asked, [Image(Path(name)) for name in "123"])
