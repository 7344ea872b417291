"""Answering many prompts at once: each step brings one token for each row, and a row that has ended makes
room for the next.

Yu et al. 2022 (Orca, OSDI) call this iteration-level scheduling."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankfold.models.answering.answer import Answer, FinishReason
from rankfold.models.answering.answerable import context_of, plain_model, what_it_takes
from rankfold.models.answering.asked import Asked
from rankfold.models.answering.company import Company
from rankfold.models.answering.drawing import DRAWN_BY, Drawn, draw
from rankfold.models.answering.guessing import guessed
from rankfold.models.answering.kept_prefixes import KeptPrefixes, Prefix
from rankfold.models.answering.prompt_block import Block
from rankfold.models.answering.sampling import Sampling
from rankfold.models.answering.shared_prefix import common, reused
from rankfold.models.answering.streaming import TextStream, decoded, stop_place, words

READ_AT_ONCE = 1024  # tokens of prompts that pass the model together, their padding too
ALIKE = 0.85  # the share of them that are no padding, at least
FREE_FOR_MORE = 8  # an eighth of the rows must be free before others come in: reading few prompts is slow
KEPT_SHARE = 0.25  # of the memory for keys and values, for those of rows that have ended
KEY_BITS = 63
GONE = "nobody waits for the answer any more"
NOT_NUMBERS = "the model's logits are not all finite numbers; it cannot say what comes next"


@dataclass(eq=False)
class Row:
    """A prompt that is being answered."""

    place: int
    asked: Asked
    stream: TextStream | None
    randoms: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.asked.ids + self.tokens

    @property
    def sampling(self) -> Sampling:
        return self.asked.manner.sampling

    @property
    def adapter(self) -> str | None:
        return self.asked.manner.adapter

    @property
    def is_gone(self) -> bool:
        return self.asked.gone is not None and self.asked.gone()


class Loop:
    """Answers by one model, up to ``at_once`` rows at a time, whose keys and values are to take no more than
    ``cache_bytes``, with those that are kept.  ``guesses``: how many tokens are guessed for a row that is
    alone (see ``guessing``)."""

    def __init__(self, model: Any, at_once: int, cache_bytes: float, guesses: int = 0) -> None:
        from rankfold.models.answering.slots import Slots

        self.at_once, self.guesses = at_once, guesses
        self.cache_bytes = (1 - KEPT_SHARE) * cache_bytes
        self.kept = KeptPrefixes(KEPT_SHARE * cache_bytes)
        self.company = Company(model)
        self.model = plain_model(model)
        self.takes = what_it_takes(self.model)
        self.context = context_of(self.model)
        self.slots = Slots()
        self.rows: list[Row] = []  # in the order of the slots
        self.waiting: deque[Row] = deque()
        self.ended: list[tuple[int, Answer]] = []

    def run(self, asked: Iterator[tuple[int, Asked]]) -> Iterator[tuple[int, Answer]]:
        """Each prompt's place with its answer, as they end."""
        while True:
            for place, each in islice(asked, self.wanted):
                self.put(place, each)
            if not self.is_busy:
                return
            yield from self.turn()

    @property
    def wanted(self) -> int:
        """How many prompts more are to wait, so that all places could be taken."""
        return max(0, self.at_once - len(self.waiting))

    @property
    def is_busy(self) -> bool:
        return bool(self.rows or self.waiting or self.ended)

    def put(self, place: int, asked: Asked) -> None:
        """Let a prompt wait; its answer is given under ``place``."""
        manner = asked.manner
        stream = None
        if asked.write is not None:
            stream = TextStream(manner.tokenizer, asked.write, manner.sampling.stop, manner.verbatim)
        row = Row(place, asked, stream, random.Random(asked.seed))
        if not asked.ids:
            self._fail(row, "the prompt is empty, and this model has no token that begins a text")
        elif len(asked.ids) >= self.context:
            length = f"{len(asked.ids):,} tokens"
            self._fail(row, f"the prompt has {length}, and the model reads up to {self.context:,}")
        else:
            self.waiting.append(row)

    @torch.inference_mode()
    def turn(self) -> list[tuple[int, Answer]]:
        """Bring one token for each row, and give what has ended."""
        self._drop_the_gone()
        self._let_in()
        if self.rows:
            self._step()
        ended, self.ended = self.ended, []
        return ended

    def _drop_the_gone(self) -> None:
        for row in [row for row in self.waiting if row.is_gone]:
            self.waiting.remove(row)
            self._fail(row, GONE)
        for place in reversed(range(len(self.rows))):
            if self.rows[place].is_gone:
                self._fail(self.rows[place], GONE)
                self._drop(place)

    def _let_in(self) -> None:
        """Read prompts of waiting rows, if enough places are free for them."""
        free = self.at_once - len(self.rows)
        if self.rows and free < min(len(self.waiting), max(1, self.at_once // FREE_FOR_MORE)):
            return
        while self.waiting and len(self.rows) < self.at_once:
            group = self._next_group(self.at_once - len(self.rows))
            if not group:
                return
            self._read(group)

    def _next_group(self, most: int) -> list[Row]:
        """The next row, and others of like length that are read with it.  It is alone if it has images, or
        if those behind it begin with so much of it that reading it first costs less."""
        first, side = self.waiting[0], self._side(self.waiting[0])
        if self.rows and side != self._side(self.rows[0]):
            return []
        if not self._fits(len(self.rows) + 1, len(first.ids)):
            if not self.rows:
                self.waiting.popleft()
                self._fail(
                    first, f"{self._bytes(1, len(first.ids)) / 1e9:.1f} GB are needed for its keys and values"
                )
            return []
        self.waiting.popleft()
        others = [row for row in self.waiting if not row.asked.seen and self._side(row) == side]
        others = [] if first.asked.seen else others
        if others and others[0].adapter == first.adapter and not self._known(first)[1]:
            saved = common(first.ids, others[0].ids) * min(most - 1, len(others))
            if saved > 2 * len(first.ids):
                return [first]
        group, tokens, longest = [first], len(first.ids), len(first.ids)
        for row in sorted(others, key=lambda row: abs(len(row.ids) - len(first.ids))):
            tokens, longest = tokens + len(row.ids), max(longest, len(row.ids))
            size = (len(group) + 1) * longest
            fits = size <= READ_AT_ONCE and self._fits(len(self.rows) + len(group) + 1, longest)
            if len(group) == most or not fits or tokens < ALIKE * size:
                break
            group.append(row)
            self.waiting.remove(row)
        return group

    def _side(self, row: Row) -> str | None:
        return self.company.side(row.adapter)

    def _known(self, row: Row) -> tuple[Prefix, int]:
        """Keys and values of what begins most like ``row``, and of how many tokens they can be used; nothing
        of rows with images: tokens do not tell all."""
        if row.asked.seen:
            return [], 0
        rows = [n for n, each in enumerate(self.rows) if each.adapter == row.adapter and not each.asked.seen]
        kept = [each for each in self.kept.all if each.adapter == row.adapter]
        held = [*(self.rows[place].ids[:-1] for place in rows), *(each.ids for each in kept)]
        place, tokens = reused(row.ids, held)
        if not tokens:
            return [], 0
        return self.slots.prefix(rows[place]) if place < len(rows) else kept[place - len(rows)].prefix, tokens

    def _read(self, group: Sequence[Row]) -> None:
        """Let the model read the prompts of ``group``, but for what rows in the slots begin with too, and
        take the first token of each answer."""
        from transformers.cache_utils import DynamicCache

        from rankfold.models.answering.slots import begun

        known, shared = [row.ids for row in group], [self._known(row) for row in group]
        width = max(tokens for _, tokens in shared)
        filled = begun(shared) if width else DynamicCache()
        block = Block.of(known, [tokens for _, tokens in shared], self.model.device)
        self.company.call([row.adapter for row in group])
        logits = self._logits(filled, block.ids, block.mask, block.positions, block.ends, _seen(group[0]))
        before = len(self.rows)
        for row, (ids, (_, tokens)) in enumerate(zip(known, shared, strict=True)):
            self.slots.add(filled, row, width - tokens, width - tokens + len(ids))
        self.rows += group
        self._take(before, block.at_ends(logits))

    def _logits(
        self,
        cache: Any,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        kept: list[int],
        seen: dict[str, Tensor],
    ) -> Tensor:
        """The logits (rows, kept, vocabulary) at the places ``kept`` of ``ids`` (rows, tokens)."""
        few = "logits_to_keep" in self.takes
        options = {"logits_to_keep": torch.tensor(kept, device=ids.device)} if few else {}
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **options,
            **{name: value.to(ids.device) for name, value in seen.items()},
        ).logits
        return logits if few else logits[:, kept]

    def _step(self) -> None:
        """One token more for each row; if it is alone, as many as were guessed rightly, and one."""
        self._make_room()
        guess = self._guess()
        width, slots, device = 1 + len(guess), self.slots, self.model.device
        ids = torch.tensor([[row.tokens[-1], *guess] for row in self.rows], device=device)
        positions = torch.tensor(slots.lengths, device=device)[:, None] + torch.arange(width, device=device)
        slots.make_room(len(self.rows), width)
        self.company.call([row.adapter for row in self.rows])
        logits = self._logits(slots.cache, ids, slots.mask(width, device), positions, [*range(width)], {})
        alone = self.rows[0]
        for place, said in enumerate([*guess, None]):
            slots.advance()
            self._take(0, logits[:, place])
            if alone not in self.rows or alone.tokens[-1] != said:
                return

    def _guess(self) -> list[int]:
        if len(self.rows) > 1 or not self.guesses:
            return []
        [row] = self.rows
        left = min(row.sampling.max_new_tokens - len(row.tokens), self.context - len(row.ids)) - 1
        return guessed(row.ids, int(min(self.guesses, left))) if left > 0 else []

    def _make_room(self) -> None:
        """Let the last rows wait if there is no memory for a token more of each."""
        while len(self.rows) > 1 and not self._fits(len(self.rows), max(self.slots.lengths) + 1):
            self.waiting.appendleft(self.rows[-1])
            self._drop(len(self.rows) - 1)

    def _take(self, first: int, logits: Tensor) -> None:
        """Draw a token for each row from ``first`` on, and let those go that have ended."""
        rows = self.rows[first:]
        drawn = _drawn(rows, logits)
        for place in reversed(range(len(rows))):  # as the last row takes the place of one that goes
            if self._has_ended(rows[place], drawn[place]):
                if drawn[place] is not None and not rows[place].asked.seen:
                    prefix = self.slots.prefix(first + place)
                    self.kept.add(rows[place].adapter, rows[place].ids[:-1], prefix)
                self._drop(first + place)

    def _has_ended(self, row: Row, drawn: Drawn | None) -> bool:
        if drawn is None:
            self._fail(row, NOT_NUMBERS)
            return True
        row.tokens.append(drawn.token)
        if drawn.logprob is not None:
            row.logprobs.append(drawn.logprob)
        if row.asked.hear is not None:
            row.asked.hear(drawn)
        if row.stream is not None:
            row.stream.put(row.tokens)
        reason = self._reason(row)
        if reason is not None:
            self._end(row, reason)
        return reason is not None

    def _reason(self, row: Row) -> FinishReason | None:
        manner, stop = row.asked.manner, row.sampling.stop
        if row.tokens[-1] in manner.stops:
            return "stop"
        if stop and stop_place(words(manner.tokenizer, row.tokens), stop) is not None:
            return "stop"
        full = len(row.tokens) >= row.sampling.max_new_tokens or len(row.ids) >= self.context
        return "length" if full else None

    def _end(self, row: Row, reason: FinishReason) -> None:
        if row.stream is not None:
            row.stream.end(row.tokens)
        manner = row.asked.manner
        answer = Answer(
            decoded(manner.tokenizer, row.tokens, row.sampling.stop, manner.verbatim),
            row.tokens,
            reason,
            len(row.asked.ids),
            row.logprobs if row.sampling.logprobs else None,
        )
        self.ended.append((row.place, answer))

    def _fail(self, row: Row, problem: str) -> None:
        self.ended.append((row.place, Answer.missing(problem, len(row.asked.ids))))

    def _drop(self, place: int) -> None:
        self.slots.remove(place)
        self.rows[place] = self.rows[-1]
        del self.rows[-1]

    def _bytes(self, rows: int, longest: int) -> float:
        return rows * longest * self.slots.column_bytes

    def _fits(self, rows: int, longest: int) -> bool:
        longest = max([longest, *self.slots.lengths])
        return self._bytes(rows, longest) <= self.cache_bytes


def _drawn(rows: Sequence[Row], logits: Tensor) -> list[Drawn | None]:
    """A token for each row of ``logits``; those that are drawn alike are drawn together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        how = [getattr(row.sampling, name) for name in (*DRAWN_BY, "logprobs")]
        alike.setdefault((*how, row.asked.likeliest), []).append(place)
    found: list[Drawn | None] = [None] * len(rows)
    for places in alike.values():
        some = [rows[place] for place in places]
        own = logits if len(places) == len(rows) else logits[places]
        for place, drawn in zip(places, _drawn_alike(some, own), strict=True):
            found[place] = drawn
    return found


def _drawn_alike(rows: Sequence[Row], logits: Tensor) -> list[Drawn | None]:
    sampling, said = rows[0].sampling, []
    if sampling.repetition_penalty != 1:
        said = [torch.tensor(sorted({*row.ids}), device=logits.device) for row in rows]
    keys = [row.randoms.getrandbits(KEY_BITS) for row in rows]
    bends = [row.asked.bend for row in rows]
    return draw(logits, sampling, said, keys, bends, rows[0].asked.likeliest)


def _seen(row: Row) -> dict[str, Tensor]:
    """What the model reads of a row's images: marks of its tokens go on with zeros behind the prompt."""
    prompt, said = len(row.asked.ids), len(row.tokens)
    return {
        name: pad(value, (0, said)) if value.shape[1:] == (prompt,) else value
        for name, value in row.asked.seen.items()
    }
