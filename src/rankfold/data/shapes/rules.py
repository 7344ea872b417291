"""What must hold of an example before it is trained on: a table of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rankfold.data.shapes.example import Example, Message

MAX_TURNS = 2_000
IMAGE_MARK = "<image>"
MEDIA_MARK = re.compile(r"<video>|<audio>|<VIDEO_CONTEXT>|<AUDIO_CONTEXT>")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule, and how, in words that follow on the example's origin.  A fatal one stops training."""

    rule: str
    text: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """``check`` yields what is wrong in words, nothing if the rule is kept."""

    name: str
    fatal: bool
    check: Callable[[Example], Iterator[str]]


def problems(example: Example) -> list[Problem]:
    """Every rule that ``example`` breaks."""
    return [Problem(rule.name, text, rule.fatal) for rule in RULES for text in rule.check(example)]


def _conversations(example: Example) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """The turns, and for a preference pair those that end with the rejected answer, with words for both."""
    if example.messages:
        yield "", example.messages
    if example.rejected:
        yield "in the rejected answer, ", example.rejected


def _turns(example: Example) -> Iterator[tuple[str, Message]]:
    for what, messages in _conversations(example):
        for place, message in enumerate(messages, start=1):
            yield f"{what}message {place} ({message.role})", message


def _known_roles(example: Example) -> Iterator[str]:
    for message in (*example.messages, *example.rejected):
        if message.role not in ROLES:
            yield f"unknown role {message.role!r}; known are system, user, assistant and tool"


def _order(example: Example) -> Iterator[str]:
    """A system turn only at the start, then the user and the assistant in turn; tools answer calls.  Whether
    another order can be rendered is for the model's template to say."""
    if not example.messages:
        return
    before = ""
    for place, message in enumerate(example.messages, start=1):
        role = message.role
        if role in ROLES and role not in FOLLOWERS[before]:
            wanted = " or ".join(FOLLOWERS[before])
            silent = "; it is read, not trained on" if role == "assistant" and place == 1 else ""
            yield f"message {place} is the {role}'s {_after(before)}, where the {wanted}'s is usual{silent}"
            return
        before = "call" if message.tool_calls else role if role in ROLES else before


def _after(before: str) -> str:
    return f"after the {'tool call' if before == 'call' else before}" if before else "at the start"


def _ends_with_answer(example: Example) -> Iterator[str]:
    for what, messages in _conversations(example):
        if messages[-1].role != "assistant":
            yield f"{what}the last message is the {messages[-1].role}'s, not the assistant's"


def _has_content(example: Example) -> Iterator[str]:
    for message in (*example.messages, *example.rejected):
        if not message.parts:
            places = (place for place, turn in _turns(example) if not turn.parts)
            yield f"{', '.join(places)}: the content is missing or null"
            return


def _is_not_empty(example: Example) -> Iterator[str]:
    for message in (*example.messages, *example.rejected):
        if message.role in ("user", "assistant") and _says_nothing(message):
            yield f"{', '.join(place for place, turn in _turns(example) if _says_nothing(turn))}: empty"
            return


def _says_nothing(message: Message) -> bool:
    if not message.parts or message.tool_calls:
        return False
    return not any(not isinstance(part, str) or (part and not part.isspace()) for part in message.parts)


def _system_is_not_empty(example: Example) -> Iterator[str]:
    if example.messages and example.messages[0].role == "system" and _says_nothing(example.messages[0]):
        yield "the system message is empty, which is not the same as none"


def _text_is_not_empty(example: Example) -> Iterator[str]:
    if not example.messages and not example.text.strip():
        yield "the text is empty"


def _images_are_there(example: Example) -> Iterator[str]:
    for message in (*example.messages, *example.rejected):
        for part in message.parts:
            if not isinstance(part, str) and not part.path.is_file():
                yield f"no such image: {part.path}"


def _marks_have_images(example: Example) -> Iterator[str]:
    marks = sum(message.text.count(IMAGE_MARK) for message in (*example.messages, *example.rejected))
    if marks:
        images = sum(len(message.images) for message in example.messages)
        yield f"{marks + images} {IMAGE_MARK} marks in the text, but {images} images"


def _media_are_there(example: Example) -> Iterator[str]:
    parts = (part for message in (*example.messages, *example.rejected) for part in message.parts)
    texts = (part for part in parts if isinstance(part, str) and "<" in part)
    if marks := {mark for text in texts for mark in MEDIA_MARK.findall(text)}:
        yield f"the text speaks of {' and '.join(sorted(marks))}, which nothing here sees or hears"


def _calls_are_answered(example: Example) -> Iterator[str]:
    """Within the messages, each call has its result; a call as the last turn is what is learnt."""
    open_calls: list[str] = []
    for place, message in enumerate(example.messages, start=1):
        if message.role == "tool":
            if message.tool_call_id and open_calls and message.tool_call_id not in open_calls:
                yield f"message {place} answers {message.tool_call_id!r}, but the calls are {open_calls}"
        elif message.tool_calls:
            open_calls = [str(call["id"]) for call in message.tool_calls if "id" in call]
            calls, results = len(message.tool_calls), _results_after(example.messages, place)
            if place < len(example.messages) and results not in (0, calls):
                yield f"message {place} makes {calls} tool calls, but {results} results follow"


def _results_after(messages: tuple[Message, ...], place: int) -> int:
    roles = [message.role for message in messages[place:]]
    return next((count for count, role in enumerate(roles) if role != "tool"), len(roles))


def _called_tools_are_on_offer(example: Example) -> Iterator[str]:
    offered = {tool.get("function", tool).get("name") for tool in example.tools}
    called = {call["function"]["name"] for m in example.messages for call in m.tool_calls}
    if offered and called - offered:
        yield f"calls of tools that are not on offer: {', '.join(sorted(called - offered))}"


def _something_is_trained(example: Example) -> Iterator[str]:
    answers = [message for message in example.messages[1:] if message.role == "assistant"]
    if answers and all(message.train is False for message in answers):
        yield "no assistant's turn is trained: all their train flags are off"
    if not answers and example.messages and example.messages[-1].role == "assistant":
        yield "nothing stands before the only answer, so there is nothing that it answers"


def _weights_are_one(example: Example) -> Iterator[str]:
    for place, message in enumerate(example.messages, start=1):
        if message.weight != 1:
            yield f"message {place}: the loss of each of its tokens counts {message.weight:g} times"


def _answers_differ(example: Example) -> Iterator[str]:
    if example.rejected and example.messages[-len(example.rejected) :] == example.rejected:
        yield "the chosen and the rejected answer are the same"


def _is_not_endless(example: Example) -> Iterator[str]:
    if len(example.messages) > MAX_TURNS:
        yield f"{len(example.messages):,} messages, more than {MAX_TURNS:,}"


# Which roles may follow which; "" is the start, "call" an assistant's turn that calls tools.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
RULES = (
    Rule("unknown-role", True, _known_roles),
    Rule("role-order", False, _order),
    Rule("last-is-answer", True, _ends_with_answer),
    Rule("null-content", True, _has_content),
    Rule("empty-turn", True, _is_not_empty),
    Rule("empty-system", False, _system_is_not_empty),
    Rule("empty-text", True, _text_is_not_empty),
    Rule("missing-image", True, _images_are_there),
    Rule("image-count", True, _marks_have_images),
    Rule("media-mark", False, _media_are_there),
    Rule("tool-results", False, _calls_are_answered),
    Rule("unknown-tool", False, _called_tools_are_on_offer),
    Rule("nothing-trained", True, _something_is_trained),
    Rule("loss-weight", False, _weights_are_one),
    Rule("same-answers", True, _answers_differ),
    Rule("too-many-turns", True, _is_not_endless),
)
