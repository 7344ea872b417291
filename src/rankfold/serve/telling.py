"""Answers in OpenAI's words: whole, and piece by piece."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rankfold.models.answering.answer import Answer
from rankfold.models.answering.drawing import Drawn
from rankfold.serve.calls import CallForm, Tools
from rankfold.serve.replies import Piece, Reply
from rankfold.serve.speakers import Speaker

Chunk = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def sent(value: Any) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


@dataclass
class Told:
    """What all answers to one request have in common."""

    kind: str
    speaker: Speaker
    wants_logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    calls: CallForm | None = None
    tools: Tools = field(default_factory=dict)
    echoed: Sequence[str] = ()
    per_prompt: int = 1

    def head(self, is_chunk: bool = False) -> Chunk:
        prefix = "chatcmpl" if self.kind == "chat.completion" else "cmpl"
        kind = f"{self.kind}.chunk" if is_chunk and self.kind == "chat.completion" else self.kind
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.speaker.name,
        }

    def token(self, number: int) -> dict[str, Any]:
        raw = bytes(self.speaker.words.decode_bytes([number]))
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


class ChatTold(Told):
    """``chat.completion``"""

    def whole(self, replies: Sequence[Reply], answers: Sequence[Answer]) -> Chunk:
        choices = [self._choice(*pair) for pair in zip(replies, answers, strict=True)]
        return {**self.head(), "choices": choices, "usage": usage_of(answers, len(answers))}

    def _choice(self, reply: Reply, answer: Answer) -> Chunk:
        text, calls = self.read(answer.text)
        message: Chunk = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        return {
            "index": reply.number,
            "message": message,
            "logprobs": self.logprobs(reply.drawn),
            "finish_reason": "tool_calls" if calls else answer.finish_reason,
        }

    def read(self, text: str) -> tuple[str, list[Chunk]]:
        return self.calls.read(text, self.tools) if self.calls and self.tools else (text, [])

    def logprobs(self, drawn: Sequence[Drawn]) -> Chunk | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **self.token(each.token),
                "logprob": each.logprob,
                "top_logprobs": [{**self.token(token), "logprob": value} for token, value in each.likeliest],
            }
            for each in drawn
        ]
        return {"content": content, "refusal": None}

    def chunk(self, number: int, delta: Chunk, reason: str | None = None, logprobs: Any = None) -> Chunk:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head(True), "choices": [choice]}


class ChatStream:
    """The chunks of one answer of a chat; of text that may be the beginning of a call nothing is shown."""

    def __init__(self, told: ChatTold, reply: Reply) -> None:
        self.told, self.reply = told, reply
        self.text, self.shown = "", 0

    def begun(self) -> Chunk:
        return self.told.chunk(self.reply.number, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> list[Chunk]:
        self.text += piece.text
        held = self.told.calls.may_begin(self.text) if self.told.calls and self.told.tools else None
        text = self._until(len(self.text) if held is None else held)
        logprobs = self.told.logprobs(piece.drawn)
        return (
            [self.told.chunk(self.reply.number, {"content": text}, None, logprobs)]
            if text or logprobs
            else []
        )

    def ended(self, answer: Answer) -> list[Chunk]:
        text, calls = self.told.read(answer.text)
        self.text = text if calls else answer.text
        rest, logprobs = self._until(len(self.text)), self.told.logprobs(self.reply.rest())
        delta: Chunk = {"content": rest} if rest else {}
        if calls:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        reason = "tool_calls" if calls else answer.finish_reason
        some = [self.told.chunk(self.reply.number, delta, None, logprobs)] if delta or logprobs else []
        return [*some, self.told.chunk(self.reply.number, {}, reason)]

    def _until(self, end: int) -> str:
        new = self.text[self.shown : end]
        self.shown = max(self.shown, end)
        return new


class TextTold(Told):
    """``text_completion``"""

    def whole(self, replies: Sequence[Reply], answers: Sequence[Answer]) -> Chunk:
        choices = [
            self.choice(
                reply.number,
                self.echo(reply.number) + answer.text,
                answer.finish_reason,
                reply.drawn,
            )
            for reply, answer in zip(replies, answers, strict=True)
        ]
        return {**self.head(), "choices": choices, "usage": usage_of(answers, self.per_prompt)}

    def echo(self, number: int) -> str:
        return self.echoed[number // self.per_prompt] if self.echoed else ""

    def choice(self, number: int, text: str, reason: str | None, drawn: Sequence[Drawn]) -> Chunk:
        logprobs = None
        if self.wants_logprobs:
            tokens = [self.token(each.token)["token"] for each in drawn]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [each.logprob for each in drawn],
                "top_logprobs": [
                    {self.token(token)["token"]: value for token, value in each.likeliest} for each in drawn
                ],
                "text_offset": [*accumulate(map(len, tokens[:-1]), initial=0)] if tokens else [],
            }
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def chunk(self, number: int, text: str, reason: str | None, drawn: Sequence[Drawn]) -> Chunk:
        return {**self.head(True), "choices": [self.choice(number, text, reason, drawn)]}


def usage_of(answers: Sequence[Answer], per_prompt: int) -> dict[str, Any]:
    """Tokens of all prompts, each once, and of all answers."""
    read = sum(answer.prompt_tokens for answer in answers[:: max(1, per_prompt)])
    written = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
