"""Shapes of rows that are conversations, and of running text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.column_names import ANSWER_NAMES, BESIDE, CONTEXT_NAMES, IMAGE_NAMES, PROMPT_NAMES
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.fields import Values, described, objects_of, text_of, truth_of
from rankfold.data.shapes.shape import Columns, Shape
from rankfold.data.shapes.turns import (
    conversation,
    image_of,
    messages_of,
    spoken,
    system_of,
    tools_of,
    with_images,
)

EXCHANGE_KEYS = {"system", "input", "output", "output_with_loss"}  # of xtuner's turns


def from_turns(row: Row, columns: Columns) -> Example:
    """A list of turns: role and content, from and value, or xtuner's system, input and output.

    xtuner writes running text as the output of one exchange without a word of input."""
    key = columns["messages"]
    turns = objects_of(row.values, key)
    if not turns:
        raise ValueError(f"{key!r} holds no messages")
    if all(turn.get("role") == "pretrain" for turn in turns):
        return _to_be_learnt_whole(row, turns)
    if any("output" in turn and "role" not in turn and "from" not in turn for turn in turns):
        messages = _from_exchanges(turns)
        if [message.text.strip() == "" for message in messages] == [True, False]:
            return Example(row.origin, text=messages[1].text)
    else:
        messages = messages_of(turns, row.folder)
    return chat(row, columns, messages)


def _to_be_learnt_whole(row: Row, turns: list[dict[str, Any]]) -> Example:
    """xtuner's running text: turns of the role ``pretrain``."""
    messages = messages_of(turns, row.folder)
    if any(message.images for message in messages):
        raise ValueError("running text with images is not trained on here; only answers about them are")
    return Example(row.origin, text="\n".join(message.text for message in messages))


def chat(row: Row, columns: Columns, messages: list[Message]) -> Example:
    """The messages with what stands beside them: a system prompt, tools, images."""
    if "system" in columns:
        messages = [*system_of(row.values, columns["system"]), *messages]
    images = _images(row, columns)
    if images:
        messages = with_images(messages, images)
    tools = tools_of(row.values, columns["tools"]) if "tools" in columns else ()
    return Example(row.origin, tuple(messages), tools=tools)


def _images(row: Row, columns: Columns) -> list[Image]:
    value = row.values.get(columns["images"]) if "images" in columns else None
    if value is None or value == "":
        return []
    images = [image_of(item, row.folder) for item in (value if isinstance(value, list) else [value])]
    for side in ("width", "height"):
        if side in columns:
            sizes = row.values[columns[side]]
            count = len(sizes) if isinstance(sizes, list) else 1
            if sizes is not None and count != len(images):
                raise ValueError(f"{len(images)} images, but {count} in {columns[side]!r}")
    return images


def _from_exchanges(turns: list[dict[str, Any]]) -> list[Message]:
    messages: list[Message] = []
    for place, turn in enumerate(turns, start=1):
        try:
            train = truth_of(turn, "output_with_loss") if "output_with_loss" in turn else None
            answer = Message("assistant", spoken("assistant", turn, "output").parts, train)
            messages += [*system_of(turn), spoken("user", turn, "input"), answer]
        except ValueError as error:
            raise ValueError(f"exchange {place}: {error}") from error
    return messages


def from_alpaca(row: Row, columns: Columns) -> Example:
    """Instruction and input, joined by a line feed, are asked; the output is the answer."""
    prompt = spoken("user", row.values, columns["instruction"])
    more = text_of(row.values, columns["input"]) if "input" in columns else None
    if more and more.strip():
        prompt = Message("user", (f"{prompt.text}\n{more}",))
    answer = spoken("assistant", row.values, columns["output"])
    return chat(row, columns, [*_history(row.values, columns), prompt, answer])


def from_prompt(row: Row, columns: Columns) -> Example:
    """A prompt, perhaps about a text, and a completion: texts, or lists of messages."""
    messages = asked_and_answered(row, columns)
    return chat(row, columns, _about(text_of(row.values, columns.get("context", "")), messages))


def _about(context: str | None, messages: list[Message]) -> list[Message]:
    """``messages`` with the text that they are about before the first question."""
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if first is None or not context or not context.strip():
        return messages
    asked = replace(messages[first], parts=(f"{context}\n\n", *messages[first].parts))
    return [*messages[:first], asked, *messages[first + 1 :]]


def asked_and_answered(row: Row, columns: Columns) -> list[Message]:
    history = _history(row.values, columns)
    prompt = conversation(row.values, columns["prompt"], row.folder)
    key = columns["completion"]
    if isinstance(row.values.get(key), list):
        return [*history, *prompt, *conversation(row.values, key, row.folder)]
    return [*history, *prompt, spoken("assistant", row.values, key)]


def _history(values: Values, columns: Columns) -> list[Message]:
    """Earlier turns as pairs of what was asked and what was answered."""
    pairs = values.get(columns["history"]) if "history" in columns else None
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004
        raise ValueError(f"{columns['history']!r} must be a list of pairs of texts, got {described(pairs)}")
    messages = []
    for asked, answered in pairs:
        pair = {"question": asked, "answer": answered}
        messages += [spoken("user", pair, "question"), spoken("assistant", pair, "answer")]
    return messages


def from_answers(row: Row, columns: Columns) -> Example:
    """A question, perhaps about a text, and the answers that are right; the first is learnt.

    They are a list, or SQuAD's object of texts and where they start (Rajpurkar et al. 2016, arXiv
    1606.05250), which has none where the text does not tell."""
    answers = answers_of(row.values[columns["answers"]])
    if not answers:
        raise ValueError(f"{columns['answers']!r} is empty: the question has no answer")
    answer = spoken("assistant", {columns["answers"]: answers[0]}, columns["answers"])
    messages = [spoken("user", row.values, columns["question"]), answer]
    return chat(row, columns, _about(text_of(row.values, columns.get("context", "")), messages))


def answers_of(value: Any) -> list[Any]:
    texts = value.get("text") if isinstance(value, dict) else value
    return texts if isinstance(texts, list) else [texts]


def _are_answers(values: Values, columns: Columns) -> bool:
    found = answers_of(values[columns["answers"]])
    return not any(isinstance(item, dict | list) for item in found)


def from_text(row: Row, columns: Columns) -> Example:
    text = text_of(row.values, columns["text"])
    return Example(row.origin, text=text or "")


def from_labelled(row: Row, columns: Columns) -> Example:
    """The text is asked, and its label is the answer."""
    answer = text_of(row.values, columns["label"])
    if answer is None:
        raise ValueError(f"{columns['label']!r} must be a class's name or number, got nothing")
    messages = (spoken("user", row.values, columns["text"]), Message("assistant", (answer,)))
    return Example(row.origin, messages, label=answer)


def _is_class(values: Values, columns: Columns) -> bool:
    return not isinstance(values[columns["label"]], list | dict | float)


TURNS = {
    "internvl": Shape(
        "internvl",
        "InternVL's rows: conversations about one image or several, with their width and height",
        {
            "messages": ("conversations",),
            "images": IMAGE_NAMES,
            "width": ("width", "width_list"),
            "height": ("height", "height_list"),
        },
        from_turns,
    ),
    "llava": Shape(
        "llava",
        "LLaVA's rows: conversations in which <image> stands where an image belongs",
        {"messages": ("conversations",), "images": IMAGE_NAMES},
        from_turns,
        {"system": ("system",)},
    ),
    "messages": Shape(
        "messages",
        "OpenAI's messages: turns of role and content",
        {"messages": ("messages",)},
        from_turns,
        BESIDE,
    ),
    "sharegpt": Shape(
        "sharegpt",
        "ShareGPT's conversations: turns of from and value, or of role and content",
        {"messages": ("conversations",)},
        from_turns,
        BESIDE,
    ),
    "xtuner": Shape(
        "xtuner",
        "xtuner's conversation: exchanges of system, input and output",
        {"messages": ("conversation",)},
        from_turns,
        BESIDE,
    ),
}
ANSWERS = {
    "alpaca": Shape(
        "alpaca",
        "alpaca's rows: an instruction, perhaps with an input, and the output",
        {"instruction": ("instruction", "instructions"), "output": ("output", *ANSWER_NAMES)},
        from_alpaca,
        {"input": ("input", "context"), "history": ("history",), **BESIDE},
    ),
    "prompt-completion": Shape(
        "prompt-completion",
        "a prompt and its completion, each a text or a list of messages",
        {"prompt": PROMPT_NAMES, "completion": ANSWER_NAMES},
        from_prompt,
        {"history": ("history",), "context": CONTEXT_NAMES, **BESIDE},
    ),
    "question-answers": Shape(
        "question-answers",
        "a question, perhaps about a text, and a list of right answers: SQuAD and its relatives",
        {"question": PROMPT_NAMES, "answers": ("answers",)},
        from_answers,
        {"context": CONTEXT_NAMES, **BESIDE},
        accepts=_are_answers,
    ),
    "classification": Shape(
        "classification",
        "a text and its class: the label is the answer",
        {"text": ("text", "sentence"), "label": ("label",)},
        from_labelled,
        accepts=_is_class,
    ),
}
TEXT = {
    "text": Shape(
        "text", "running text, continued rather than answered", {"text": ("text", "content")}, from_text
    )
}
