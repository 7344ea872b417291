from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankfold.data.reading.row import Row
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.formats import SHAPES, detect_shape, to_example


def example_of(values: dict, name: str) -> Example:
    """The example of a row whose shape must be detected as ``name``."""
    shape = detect_shape(values)
    assert shape.name == name
    return to_example(Row(values, "f:1", "data"), shape)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    head = (Message("system", (system,)),) if system else ()
    roles = ("user", "assistant")
    return (*head, *(Message(roles[place % 2], (text,)) for place, text in enumerate(contents)))


OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": OPENAI}, "messages"),
        ({"messages": OPENAI, "id": 3, "source": "x"}, "messages"),
        ({"messages": json.dumps(OPENAI)}, "messages"),
        ({"messages": None, "conversations": SHAREGPT}, "sharegpt"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"conversations": OPENAI}, "sharegpt"),
        ({"conversation": [{"input": "q", "output": "a"}]}, "xtuner"),
        ({"conversation": OPENAI}, "xtuner"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, "alpaca"),
        ({"instruction": "q", "context": "", "response": "a", "category": "x"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"prompt": [OPENAI[0]], "completion": [OPENAI[1]]}, "prompt-completion"),
        ({"question": "q", "answer": "a"}, "prompt-completion"),
        ({"query": "q", "response": "a", "history": None}, "prompt-completion"),
        ({"input": "q", "output": "a"}, "prompt-completion"),
        ({"problem": "q", "solution": "a", "level": "5"}, "prompt-completion"),
        ({"prompt": "q", "completion": "a", "label": "joke"}, "prompt-completion"),
    ],
)
def test_every_spelling_of_a_question_and_its_answer_becomes_the_same_chat(values, name):
    assert example_of(values, name) == Example("f:1", turns("q", "a"))


def test_tools_and_a_system_prompt_may_stand_beside_the_turns():
    for tools in ([TOOL], json.dumps([TOOL])):
        example = example_of({"conversations": SHAREGPT, "system": "s", "tools": tools}, "sharegpt")
        assert example == Example("f:1", turns("q", "a", system="s"), tools=(TOOL,))


def test_alpacas_input_and_history_are_part_of_what_is_asked():
    values = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "s", "history": [["q", "a"]]}
    assert example_of(values, "alpaca").messages == turns("q", "a", "Add.\n1, 2", "3", system="s")


def test_xtuners_exchanges_may_each_say_whether_they_are_trained():
    exchanges = [
        {"system": "s", "input": "q", "output": "a", "output_with_loss": False},
        {"input": "r", "output": "b"},
    ]
    expected = list(turns("q", "a", "r", "b", system="s"))
    expected[2] = Message("assistant", ("a",), train=False)
    assert example_of({"conversation": exchanges}, "xtuner").messages == tuple(expected)


@pytest.mark.parametrize("column", ["text", "content"])
def test_a_text_column_is_running_text_whatever_stands_beside_it(column):
    assert example_of({column: "words", "id": 3, "url": "x"}, "text") == Example("f:1", text="words")


@pytest.mark.parametrize("values", [{"jokes": "words"}, {"": "0", "jokes": "words"}])
def test_a_single_column_of_any_name_is_running_text(values):
    assert example_of(values, "text") == Example("f:1", text="words")


@pytest.mark.parametrize(("label", "answer"), [("good", "good"), (3, "3"), (True, "true")])
def test_a_labels_name_is_the_answer_of_a_classification(label, answer):
    example = example_of({"text": "words", "label": label}, "classification")
    assert example == Example("f:1", turns("words", answer), label=answer)


def test_a_text_with_a_list_of_labels_is_no_classification():
    assert example_of({"text": "words", "label": ["a", "b"]}, "text").text == "words"


LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"image": "a.png"}, "llava"),
        ({"images": ["a.png"], "id": "1"}, "llava"),
        ({"image": {"path": "a.png", "bytes": None}}, "llava"),
        ({"image": "a.png", "width": 3, "height": 4}, "internvl"),
        ({"image": ["a.png"], "width_list": [3], "height_list": [4]}, "internvl"),
    ],
)
def test_an_image_stands_where_its_mark_was(beside, name):
    example = example_of({"conversations": LLAVA, **beside}, name)
    assert example.messages[0].parts == (Image(Path("data/a.png")), "\nWhat?")


def test_a_llava_row_without_an_image_is_a_chat():
    assert example_of({"conversations": SHAREGPT, "image": None}, "llava").messages == turns("q", "a")


def test_images_may_stand_beside_openai_messages():
    example = example_of({"messages": OPENAI, "images": ["a.png"]}, "messages")
    assert example.messages[0].parts == (Image(Path("data/a.png")), "q")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"messages": []}, "'messages' holds no messages"),
        ({"messages": None}, "'messages' holds no messages"),
        ({"messages": "hi"}, "'messages' must be a list of objects, got str"),
        ({"messages": [["user", "x"]]}, "'messages' must be a list of objects, got a list of list"),
        ({"instruction": {}, "output": "a"}, "'instruction' must be text, got dict"),
        ({"instruction": "q", "output": ["a"]}, "'output' must be text, got list"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "'history' must be a list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["x", {}]]}, "'answer' must be text, got dict"),
        ({"prompt": {"a": 1}, "completion": "a"}, "'prompt' must be text or a list of messages, got dict"),
        ({"prompt": "q", "completion": {}}, "'completion' must be text, got dict"),
        ({"text": [3]}, "'text' must be text, got list"),
        ({"text": "x", "label": None}, "'label' must be a class's name or number, got nothing"),
        ({"conversation": [{"input": [], "output": "a"}]}, "exchange 1: 'input' must be text, got list"),
        ({"conversations": LLAVA, "image": "http://x/a.png"}, "not a URL"),
        ({"conversations": LLAVA, "image": ["a.png", "b.png"]}, "2 images, but 1 <image> marks"),
        ({"conversations": LLAVA, "image": "a", "width": [1, 2], "height": 1}, "1 images, but 2 in 'width'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(values, problem):
    with pytest.raises(ValueError, match=problem):
        to_example(Row(values, "f:1", "data"), detect_shape(values))


def test_every_shape_says_in_a_sentence_what_it_is():
    assert all(shape.name == name and len(shape.why) > 20 for name, shape in SHAPES.items())
