"""What can be mended in a row without guessing what its author meant, and how a row is written back."""

from __future__ import annotations

from typing import Any

from rankfold.data.check.hints import repaired_encoding
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.fields import spelt

TURNS = (("messages", "role", "content"), ("conversations", "from", "value"))
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
MENDABLE = {"system", "user", "assistant"}  # tool turns answer each other by id: left as they are

Turn = dict[str, Any]


def repaired(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row with its text and its turns mended, and what was done, in words.

    Text: mojibake is read as it was meant and control characters are removed.  Turns: roles are spelt in
    lower case; empty system turns, turns after the last answer and answers before the first question are
    dropped; a question whose answer is empty goes with it, and so does an answer to an empty question; two
    turns of one role in a row are joined.  What that leaves may still break a rule."""
    done: list[str] = []
    values = _mend_text(values, done)
    for column, role, content in TURNS:
        turns = values.get(column)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            values = {**values, column: _mend_turns(turns, role, content, done)}
    return values, list(dict.fromkeys(done))


def _mend_text(value: Any, done: list[str]) -> Any:
    if isinstance(value, str):
        text, what = repaired_encoding(value)
        done += what
        return text
    if isinstance(value, list):
        return [_mend_text(item, done) for item in value]
    if isinstance(value, dict):
        return {key: _mend_text(item, done) for key, item in value.items()}
    return value


def _mend_turns(turns: list[Turn], role: str, content: str, done: list[str]) -> list[Turn]:
    mended = [_as_text(_mend_role(turn, role, done), content) for turn in turns]
    if not all(turn.get(role) in MENDABLE and _is_plain(turn, content) for turn in mended):
        return mended
    before: list[Turn] = []
    while mended != before:  # what one step leaves may need another
        before = mended
        mended = _mend_order(_without_empty(mended, role, content, done), role, content, done)
    return mended


def _mend_order(turns: list[Turn], role: str, content: str, done: list[str]) -> list[Turn]:
    mended = _joined(turns, role, content, done)
    first = next((i for i, turn in enumerate(mended) if turn[role] != "system"), len(mended))
    if first < len(mended) and mended[first][role] == "assistant" and len(mended) > first + 1:
        done.append("answer before the first question dropped")
        mended = mended[:first] + mended[first + 1 :]
    while len(mended) > 1 and mended[-1][role] != "assistant":
        done.append(f"{mended[-1][role]} turn after the last answer dropped")
        mended = mended[:-1]
    return mended


def _mend_role(turn: Turn, role: str, done: list[str]) -> Turn:
    given = turn.get(role)
    if not isinstance(given, str):
        return turn
    wanted = given.strip().lower()
    wanted = ROLE_NAMES.get(wanted, wanted)
    # ShareGPT's own names are no mistake.
    if (role == "from" and given in ROLE_NAMES) or wanted == given:
        return {**turn, role: wanted}
    done.append(f"role {given!r} written {wanted!r}")
    return {**turn, role: wanted}


def _as_text(turn: Turn, content: str) -> Turn:
    """A number in the place of words as the text that it is read as."""
    text = spelt(turn.get(content))
    return turn if text is None else {**turn, content: text}


def _is_plain(turn: Turn, content: str) -> bool:
    text = turn.get(content)
    return (text is None or isinstance(text, str)) and not turn.get("tool_calls")


def _is_empty(turn: Turn, content: str) -> bool:
    return not (turn.get(content) or "").strip()


def _without_empty(turns: list[Turn], role: str, content: str, done: list[str]) -> list[Turn]:
    """No empty turns; with an empty question goes its answer, with an empty answer its question."""
    kept: list[Turn] = []
    unanswerable = False  # until the next question, answers have none
    for turn in turns:
        empty = _is_empty(turn, content)
        if turn[role] == "assistant" and (empty or unanswerable):
            if kept and kept[-1][role] == "user" and not unanswerable:
                kept.pop()
            done.append(
                "empty answer dropped, and its question" if empty else "answer without a question dropped"
            )
            unanswerable = True
        elif empty:
            unanswerable = unanswerable or turn[role] == "user"
            done.append(f"empty {turn[role]} turn dropped")
        else:
            unanswerable = unanswerable and turn[role] != "user"
            kept.append(turn)
    return kept


def _joined(turns: list[Turn], role: str, content: str, done: list[str]) -> list[Turn]:
    kept: list[Turn] = []
    for turn in turns:
        if kept and kept[-1][role] == turn[role]:
            kept[-1] = {**kept[-1], content: f"{kept[-1][content]}\n\n{turn[content]}"}
            done.append(f"{turn[role]} turns in a row joined")
        else:
            kept.append(turn)
    return kept


def as_row(example: Example) -> dict[str, Any]:
    """The example as a row of the ``messages`` form, or with ``text``, or of a preference or KTO row."""
    if not example.messages:
        return {"text": example.text}
    turns = [_as_turn(message) for message in example.messages]
    tools = {"tools": list(example.tools)} if example.tools else {}
    if example.rejected:
        rejected = [_as_turn(message) for message in example.rejected]
        return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": rejected, **tools}
    if example.desirable is not None:
        return {"prompt": turns[:-1], "completion": turns[-1:], "label": example.desirable, **tools}
    return {"messages": turns, **tools}


def _as_turn(message: Message) -> Turn:
    content: Any = message.text
    if message.images:
        content = [
            {"type": "image", "image": str(part.path)}
            if isinstance(part, Image)
            else {"type": "text", "text": part}
            for part in message.parts
        ]
    more = {
        "train": message.train,
        "reasoning_content": message.reasoning or None,
        "tool_calls": list(message.tool_calls) or None,
        "tool_call_id": message.tool_call_id or None,
        "name": message.name or None,
    }
    return {
        "role": message.role,
        "content": content,
        **{key: value for key, value in more.items() if value is not None},
    }
