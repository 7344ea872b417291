from __future__ import annotations

from pathlib import Path

import pytest

from rankfold.data.shapes.example import Example, Image, Message


def test_a_message_of_words_is_told_to_templates_as_text():
    message = Message("user", ("one ", "two"))
    assert message.for_template() == {"role": "user", "content": "one two"}


def test_a_message_with_images_keeps_their_places_for_templates():
    message = Message("user", (Image(Path("a.png")), "What is this?"))
    assert message.for_template()["content"] == [
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "What is this?"},
    ]
    assert message.images == (Image(Path("a.png")),)
    assert message.text == "What is this?"


def test_tool_fields_reach_templates_only_when_they_are_there():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    told = Message("assistant", ("",), tool_calls=(call,), reasoning="hm").for_template()
    assert told == {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"messages": (Message("assistant", ("a",)),)}, "chat"),
        ({"messages": (Message("assistant", ("a",)),), "desirable": False}, "feedback"),
        (
            {"messages": (Message("assistant", ("a",)),), "rejected": (Message("assistant", ("b",)),)},
            "preference",
        ),
    ],
)
def test_the_kind_follows_from_what_is_there(fields, kind):
    assert Example("f:1", **fields).kind == kind
