"""Turns of a conversation, in whichever spelling, as messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rankfold.data.shapes.example import Image, Message, Part, Role
from rankfold.data.shapes.fields import (
    Values,
    check_text,
    described,
    number_of,
    objects_of,
    one_of,
    parsed,
    text_of,
    truth_of,
)
from rankfold.data.shapes.rules import IMAGE_MARK

# How roles are spelt in OpenAI's, ShareGPT's and their relatives' files.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
CALL_ROLES = {"function_call", "tool_call"}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
PLAIN_TURNS = ({"role", "content"}, {"from", "value"})
WEIGHT_KEYS = ("weight", "loss", "loss_weight")
TRAIN_KEYS = ("train", *WEIGHT_KEYS)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call", "tool_call_id", "name")
TURN_KEYS = {
    *ROLE_KEYS,
    *CONTENT_KEYS,
    *TRAIN_KEYS,
    *REASONING_KEYS,
    *CALL_KEYS,
}  # all that is read of a turn
PART_KEYS = ("text", "value", "content")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
JSON_TURNS = re.compile(r"\s*\[\{")  # a list of turns that a table holds as JSON
CONTEXT_MARK = "<IMG_CONTEXT>"  # xtuner's, where an image of the parts beside the text belongs


def messages_of(turns: list[dict[str, Any]], folder: str) -> list[Message]:
    """One message a turn.  Raises ValueError naming the turn that cannot be understood.

    A role that nobody knows stays as it is, and a missing content gives no parts: ``rules`` tells."""
    messages = []
    for place, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn, folder))
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from error
    return messages


def conversation(values: Values, key: str, folder: str) -> list[Message]:
    """The messages at ``key``: a list of turns, or text, which is one turn of the user's."""
    found = values.get(key)
    if found is None or isinstance(found, list) or (isinstance(found, str) and JSON_TURNS.match(found)):
        return messages_of(objects_of(values, key), folder)
    if isinstance(found, dict):
        raise ValueError(f"{key!r} must be text or a list of messages, got {described(found)}")
    return [spoken("user", values, key)]


def spoken(role: Role, values: Values, key: str) -> Message:
    """A message whose words are the text at ``key``; without parts if there is none."""
    text = text_of(values, key)
    return Message(role, () if text is None else (text,))


def system_of(values: Values, key: str = "system") -> list[Message]:
    """The system message that stands in a column of its own; none if it is empty."""
    text = text_of(values, key)
    return [Message("system", (text,))] if text and text.strip() else []


def _message(turn: Values, folder: str) -> Message:
    written = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    if not isinstance(written, str):
        raise ValueError(f"'role' (or 'from') must be text, got {described(written)} in {sorted(turn)}")
    role = ROLES.get(written) or ROLES.get(written.lower(), cast(Role, written))
    content_key = next((key for key in CONTENT_KEYS if key in turn), "content")
    if written in CALL_ROLES:
        return Message(role, ("",), **_trained(turn), tool_calls=_told_calls(turn, content_key))
    content = turn.get(content_key)
    if isinstance(content, list):
        turn, parts = _of_parts(turn, content, content_key, folder)
    else:
        text = text_of(turn, content_key)
        parts = () if text is None else (text,)
    if turn.keys() in PLAIN_TURNS:  # nothing more to look for
        return Message(role, parts)
    calls = _calls(turn)
    return Message(
        role,
        parts or (("",) if calls else ()),
        **_trained(turn),
        reasoning=next((text for key in REASONING_KEYS if (text := text_of(turn, key))), ""),
        tool_calls=calls,
        tool_call_id=text_of(turn, "tool_call_id") or "",
        name=text_of(turn, "name") or "",
    )


def _of_parts(turn: Values, content: list[Any], key: str, folder: str) -> tuple[Values, tuple[Part, ...]]:
    """The turn with the thoughts and calls among the parts of its content where they belong, and the parts
    that are text and images."""
    parts: list[Part] = []
    beside: dict[str, Any] = {}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("reasoning", "thinking"):
            told = text_of(
                part, next((k for k in ("thinking", "reasoning", *PART_KEYS) if k in part), "value")
            )
            beside["reasoning_content"] = beside.get("reasoning_content", "") + (told or "")
        elif kind == "tool_call":
            call = one_of(part, ("tool_call", *PART_KEYS))
            beside.setdefault("tool_calls", []).append(parsed(call, key) if isinstance(call, str) else call)
        else:
            parts.append(_part(part, key, folder))
    return {**turn, **beside}, tuple(_in_context(parts))


def _in_context(parts: list[Part]) -> list[Part]:
    """The parts with their images where xtuner's marks stand in the text, if there are such marks."""
    marks = sum(part.count(CONTEXT_MARK) for part in parts if isinstance(part, str))
    images = [part for part in parts if isinstance(part, Image)]
    if not marks or not images:
        return parts
    if marks != len(images):
        raise ValueError(f"{len(images)} images, but {marks} {CONTEXT_MARK} marks in the text")
    rest, placed = iter(images), []
    for text in (part for part in parts if isinstance(part, str)):
        first, *others = text.split(CONTEXT_MARK)
        placed += [first, *(piece for other in others for piece in (next(rest), other))]
    return [part for part in placed if part != ""]


def _part(part: Any, key: str, folder: str) -> Part:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        text = text_of(part, next((name for name in PART_KEYS if name in part), "text"))
        if text is None:
            raise ValueError(f"a text part of {key!r} has no text")
        return text
    if kind in IMAGE_PARTS:
        return image_of(one_of(part, ("image", "image_url", "path", "url", "value")), folder)
    raise ValueError(
        f"a part of {key!r} must be of type text or image, got {kind or described(part)!r}; "
        f"--leave-out {kind or 'TYPE'} goes on without such parts"
    )


def image_of(value: Any, folder: str) -> Image:
    """The image that ``value`` names by its path, relative to ``folder``.  Raises ValueError for a URL,
    and for an image whose bytes are in the row."""
    if isinstance(value, dict):
        value = one_of(value, ("path", "url")) if value.get("bytes") is None else value
    if isinstance(value, dict | bytes):
        raise ValueError("an image's bytes are in the row; write it to a file, and put its path there")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an image must be the path of a file, got {described(value)}")
    if value.startswith(("http:", "https:", "data:", "file:")):
        raise ValueError(f"an image must be the path of a file, not a URL: {value[:60]}")
    check_text(value, "image")
    return Image(Path(folder, value))


def with_images(messages: list[Message], images: list[Image]) -> list[Message]:
    """Put ``images`` where ``<image>`` stands, in order; without any such mark, before the first words of
    the user's.  Raises ValueError if there are more images than marks; ``rules`` tells of marks left over."""
    marks = sum(part.count(IMAGE_MARK) for m in messages for part in m.parts if isinstance(part, str))
    if not marks:
        first = next((place for place, message in enumerate(messages) if message.role == "user"), 0)
        placed = [replace(turn, parts=(*images, *turn.parts)) for turn in messages[first : first + 1]]
        return [*messages[:first], *placed, *messages[first + 1 :]]
    if len(images) > marks:
        raise ValueError(f"{len(images)} images, but {marks} {IMAGE_MARK} marks in the text")
    rest = iter(images)
    return [_placed(message, rest) for message in messages]


def _placed(message: Message, images: Iterator[Image]) -> Message:
    parts: list[Part] = []
    for part in message.parts:
        pieces = part.split(IMAGE_MARK) if isinstance(part, str) else []
        if len(pieces) < 2:  # noqa: PLR2004 - an image, or text without a mark
            parts.append(part)
            continue
        for place, piece in enumerate(pieces):
            parts += [next(images, IMAGE_MARK)] if place else []
            parts += [piece] if piece else []
    return replace(message, parts=tuple(parts))


def _trained(turn: Values) -> dict[str, Any]:
    """Whether the turn is trained, as it says under one of TRAIN_KEYS, and how much it counts if it does."""
    told: dict[str, Any] = {}
    for key in TRAIN_KEYS:
        if turn.get(key) is None:
            continue
        weight = number_of(turn, key) if key in WEIGHT_KEYS else None
        if weight in (None, 0, 1):
            told.setdefault("train", truth_of(turn, key))
        else:
            told = {"train": True, "weight": weight} | told
    return told


def _calls(turn: Values) -> tuple[dict[str, Any], ...]:
    """OpenAI's ``tool_calls``, and the older ``function_call``."""
    calls = objects_of(turn, "tool_calls") if turn.get("tool_calls") is not None else []
    if turn.get("function_call") is not None:
        calls = [*calls, {"function": turn["function_call"]}]
    return tuple(_call(call) for call in calls)


def _told_calls(turn: Values, key: str) -> tuple[dict[str, Any], ...]:
    """ShareGPT's ``function_call`` turn, whose content is the call, or several, as JSON."""
    content = turn.get(key)
    found = parsed(content, key) if isinstance(content, str) else content
    calls = found if isinstance(found, list) else [found]
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> dict[str, Any]:
    """One call as chat templates read it: arguments parsed, nulls left out."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call must hold a function with a name, got {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, "arguments") if arguments.strip() else {}
    if not isinstance(arguments or {}, dict):
        raise ValueError(f"the arguments of {function['name']} must be an object, got {described(arguments)}")
    told: dict[str, Any] = {"type": "function"}
    if isinstance(call.get("id"), str):
        told["id"] = call["id"]
    return {**told, "function": {"name": function["name"], "arguments": arguments or {}}}


def tools_of(values: Values, key: str = "tools") -> tuple[dict[str, Any], ...]:
    """The tools on offer: a list of objects, or that list as JSON text."""
    return tuple(objects_of(values, key))
