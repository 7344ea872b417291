"""What a request asks of the logits: an answer that a grammar allows, tokens more or less likely."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from rankfold.models.answering.drawing import Bend, Drawn
from rankfold.serve.refusing import RefusedError
from rankfold.serve.schema import Answered, ChatRequest, OfSchema
from rankfold.serve.speakers import Speaker

ANY_OBJECT = {"type": "object"}


class Grammar:
    """Allows the tokens that the grammar does, by what was written so far."""

    def __init__(self, speaker: Speaker, grammar: str) -> None:
        from llguidance import LLMatcher

        self.matcher = LLMatcher(speaker.words, grammar, log_level=0)
        if self.matcher.is_error():
            raise RefusedError(400, f"this schema cannot be followed: {self.matcher.get_error()}",
                               param="response_format")  # fmt: skip
        self.stops = sorted(speaker.stops)

    def bend(self, logits: Tensor) -> Tensor:
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        mask = torch.zeros(len(logits), dtype=torch.bool)
        mask[: len(allowed)] = allowed[: len(logits)]
        if self.matcher.is_stopped() or not bool(mask.any()):
            mask[self.stops] = True
        return logits.masked_fill(~mask.to(logits.device), -torch.inf)

    def hear(self, drawn: Drawn) -> None:
        if not self.matcher.is_stopped():
            self.matcher.consume_token(drawn.token)


class Leanings:
    """``logit_bias``, and OpenAI's penalties for what was written: by how often, and for being there."""

    def __init__(self, asked: Answered, vocabulary: int) -> None:
        self.frequency, self.presence = asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0
        self.bias: dict[int, float] = {}
        for name, value in (asked.logit_bias or {}).items():
            if not name.isdecimal() or int(name) >= vocabulary:
                told = f"logit_bias: {name!r:.40} is no token's number below {vocabulary:,}"
                raise RefusedError(400, told, param="logit_bias")
            self.bias[int(name)] = value
        self.said: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self.bias or self.frequency or self.presence)

    def bend(self, logits: Tensor) -> Tensor:
        for token, value in self.bias.items():
            logits[token] += value
        if self.said and (self.frequency or self.presence):
            tokens = torch.tensor(list(self.said), device=logits.device)
            times = torch.tensor(list(self.said.values()), device=logits.device, dtype=logits.dtype)
            logits[tokens] -= self.frequency * times + self.presence
        return logits

    def hear(self, drawn: Drawn) -> None:
        self.said[drawn.token] += 1


def benders_of(speaker: Speaker, asked: Answered) -> list[Grammar | Leanings]:
    """What bends the logits of one answer, new for each.  Raises RefusedError."""
    vocabulary = speaker.base.model.get_input_embeddings().weight.shape[0]
    leanings = Leanings(asked, vocabulary)
    found: list[Grammar | Leanings] = [leanings] if leanings else []
    wanted = asked.response_format if isinstance(asked, ChatRequest) else None
    if wanted is None or wanted.type == "text":
        return found
    schema: dict[str, Any] = wanted.json_schema.schema_ if isinstance(wanted, OfSchema) else ANY_OBJECT
    return [*found, Grammar(speaker, _grammar_of(schema))]


def _grammar_of(schema: dict[str, Any]) -> str:
    import json

    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            400, f"this schema cannot be followed: {error}", param="response_format"
        ) from error
    return grammar


def bend_of(benders: list[Grammar | Leanings]) -> Bend | None:
    if not benders:
        return None

    def bend(logits: Tensor) -> Tensor:
        for each in benders:
            logits = each.bend(logits)
        return logits

    return bend
