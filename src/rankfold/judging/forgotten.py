"""What a model has forgotten: its loss on general text, and how far its predictions are from its base's.

The divergence is that of Kullback and Leibler (1951) from the base on the base's own likeliest tokens, all
others taken together as one, so it is at most the whole one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rankfold.data.order.batch import Batch
from rankfold.data.order.batches import micro_batch_tokens
from rankfold.data.order.batching import padded
from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import IGNORE, EncodedRow, encode_all
from rankfold.judging.general_rows import GeneralRow
from rankfold.judging.intervals import Interval, interval, resampled
from rankfold.judging.losses import target_logits

TOP = 64  # of the base's tokens at each place
LEAST_SHARE = 1e-9  # for all the other tokens together
LITTLE, SOME = 0.05, 0.25  # nats a token, below which little, and some, was forgotten
ALL = "general text"
Forward = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One domain: how many rows and tokens, the base's loss in nats a token, by how much the tuned model's is
    higher, and its divergence from the base in nats a token."""

    domain: str
    rows: int
    tokens: int
    base_loss: float
    rise: Interval
    divergence: Interval


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """All rows together, and by domain."""

    whole: Change
    domains: list[Change] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        rise = self.whole.rise
        if rise.high < 0:
            return "nothing was forgotten"
        if rise.holds_zero and rise.value < LITTLE:
            return "nothing that can be told was forgotten"
        if rise.value < LITTLE:
            return "little was forgotten"
        return "some was forgotten" if rise.value < SOME else "much was forgotten"

    @property
    def sentence(self) -> str:
        rise = self.whole.rise
        sign, word = (1, "rose") if rise.value >= 0 else (-1, "fell")
        low, high = sorted((sign * rise.low, sign * rise.high))
        numbers = f"{abs(rise.value):.2f} ({low:.2f} to {high:.2f})"
        return f"on general text the loss {word} {numbers}: {self.verdict}"

    @property
    def remedies(self) -> str:
        """What helps where much was forgotten, else an empty string."""
        if self.whole.rise.value < SOME:
            return ""
        return (
            "to forget less: a lower learning_rate, fewer steps, general rows among the data (--data "
            "rows.jsonl,general.jsonl:0.1), or --forget-limit, which keeps the best weights within it"
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model makes of general rows: the summed loss of each (rows), and of each target in the order of
    the batches the base's likeliest tokens and their log-likelihoods (targets, TOP)."""

    losses: Tensor
    tops: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class General:
    """General rows as tokens, and which domain each is of; ``questions`` are those that want an answer.
    ``forward`` is what a forward runs in."""

    rows: list[EncodedRow]
    domains: list[str]
    questions: list[Example]
    pad_id: int
    forward: Forward = nullcontext

    @classmethod
    def encoded(
        cls, rows: Sequence[GeneralRow], tokenizer: Any, max_length: int, pad_id: int, forward: Forward
    ) -> General:
        """``rows`` as the model reads them, without those that are too long.  No text's end is told."""
        numbered = [replace(row.example, origin=str(place)) for place, row in enumerate(rows)]
        encoded, _ = encode_all(numbered, tokenizer, max_length)
        texts = {example.origin for example in numbered if not example.messages}
        cut = [_endless(row) if row.origin in texts else row for row in encoded]
        kept = [row for row in cut if row.trained_tokens]
        return cls(
            rows=kept,
            domains=[rows[int(row.origin)].domain for row in kept],
            questions=[example for example in numbered if example.messages],
            pad_id=pad_id,
            forward=forward,
        )

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def first(self, tokens: int) -> General:
        """The first rows that have up to ``tokens`` tokens together, at least one of each domain."""
        count, total, seen = 0, 0, set[str]()
        for row, domain in zip(self.rows, self.domains, strict=True):
            if total + len(row) > tokens and seen == {*self.domains}:
                break
            count, total = count + 1, total + len(row)
            seen.add(domain)
        return replace(self, rows=self.rows[:count], domains=self.domains[:count])

    @torch.no_grad()
    def read_by(self, base: Any) -> Reading:
        """What the base makes of the rows."""
        losses, tops = self._nothing, []
        for group, batch in self._batches(base.device):
            found = []
            for logits, wanted, of in self._parts(base, batch):
                likely = logits.log_softmax(-1)
                losses.index_add_(0, group[of].cpu(), _taken(likely, wanted))
                best = likely.topk(min(TOP, likely.shape[-1]))
                found.append((best.indices.int().cpu(), best.values.cpu()))
            tops += found
        return Reading(losses, tops)

    @torch.no_grad()
    def forgotten(self, tuned: Any, base: Reading, seed: int) -> Forgetting:
        """What ``tuned`` has lost of what its ``base`` made of the rows."""
        losses, apart, tops = self._nothing, self._nothing, iter(base.tops)
        for group, batch in self._batches(tuned.device):
            for logits, wanted, of in self._parts(tuned, batch):
                likely = logits.log_softmax(-1)
                losses.index_add_(0, group[of].cpu(), _taken(likely, wanted))
                indices, before = (part.to(likely.device) for part in next(tops))
                after = likely.gather(-1, indices.long())
                apart.index_add_(0, group[of].cpu(), divergence(before, after))
        return self._changes(base.losses, losses, apart, seed)

    def _changes(self, before: Tensor, after: Tensor, apart: Tensor, seed: int) -> Forgetting:
        counts = torch.tensor([row.weight for row in self.rows], dtype=torch.float64)
        terms = torch.stack([after - before, apart, before, counts], dim=1)
        names = list(dict.fromkeys(self.domains))
        places = {name: [at for at, of in enumerate(self.domains) if of == name] for name in names}
        return Forgetting(
            whole=_change(ALL, terms, seed),
            domains=[_change(name, terms[places[name]], seed) for name in names] if len(names) > 1 else [],
        )

    @property
    def _nothing(self) -> Tensor:
        return torch.zeros(len(self.rows), dtype=torch.float64)

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Batch]]:
        """Each batch with the places of its rows; the same batches for every model."""
        places = {id(row): place for place, row in enumerate(self.rows)}
        batching = padded(None, micro_batch_tokens(device))
        for group in batching.cut(self.rows):
            yield (
                torch.tensor([places[id(row)] for row in group]),
                batching.collate(group, self.pad_id, device),
            )

    def _parts(self, model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits of some targets at a time, the tokens that are wanted there, and their rows in the batch."""
        was_training = model.training
        model.eval()
        start = 0
        with self.forward():
            for logits in target_logits(model, batch):
                end = start + len(logits)
                yield logits, batch.targets.tokens[start:end], batch.targets.rows[start:end].cpu()
                start = end
        model.train(was_training)


def _endless(row: EncodedRow) -> EncodedRow:
    return replace(row, labels=[*row.labels[:-1], IGNORE])


def _taken(likely: Tensor, wanted: Tensor) -> Tensor:
    return -likely.gather(-1, wanted.unsqueeze(-1)).squeeze(-1).double().cpu()


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """From log-likelihoods of the same tokens (targets, tokens), before and after: the divergence of each
    target, all other tokens taken as one (targets)."""
    before, after = before.double(), after.double()
    shares, now = before.exp(), after.exp()
    rest = (1 - shares.sum(-1)).clamp(min=LEAST_SHARE)
    rest_now = (1 - now.sum(-1)).clamp(min=LEAST_SHARE)
    found = (shares * (before - after)).sum(-1) + rest * (rest.log() - rest_now.log())
    return found.clamp(min=0).cpu()


def _change(name: str, terms: Tensor, seed: int) -> Change:
    sums, drawn = terms.sum(0), resampled(terms, seed)
    rise, apart, before = (interval(float(sums[at] / sums[3]), drawn[:, at] / drawn[:, 3]) for at in range(3))
    return Change(
        domain=name,
        rows=len(terms),
        tokens=int(sums[3]),
        base_loss=before.value,
        rise=rise,
        divergence=apart,
    )
