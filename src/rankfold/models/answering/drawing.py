"""Which token comes next, by logits and by how an answer is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold.kernels.dropout import GAMMA, mixed
from rankfold.models.answering.sampling import Sampling

UNIT = (1 << 52) - 1  # of 64 random bits so many become a number between 0 and 1
DRAWN_BY = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
)  # rows that agree in it are drawn together
Bend = Callable[[Tensor], Tensor]
CANDIDATES = 512  # tokens sorted at first: where they do not hold enough, all are


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token; and the natural logarithm of the likelihood that the model gives it, whatever was asked of
    the drawing, None if nobody wants to know; and the likeliest tokens with theirs."""

    token: int
    logprob: float | None
    likeliest: list[tuple[int, float]] = field(default_factory=list)


def draw(
    logits: Tensor,
    sampling: Sampling,
    said: Sequence[Tensor],
    keys: Sequence[int],
    bends: Sequence[Bend | None] = (),
    likeliest: int = 0,
) -> list[Drawn | None]:
    """The next token of each row of ``logits`` (rows, vocabulary); None for a row whose logits are not all
    numbers.

    ``said``: the tokens of each row so far, each once, if there is a repetition penalty.  ``keys``: a
    random number from 0 to 2^63 - 1 for each row; the same number and logits give the same token, whatever
    the other rows are.  ``bends``: what makes of a row's logits (vocabulary) those to draw from.
    ``likeliest``: how many of the likeliest tokens are told beside the drawn one."""
    logits = logits.float()
    highest, tokens = logits.max(dim=-1)  # which is NaN if one of them is
    sound = highest.isfinite().tolist()
    asked = (
        penalised(logits, said, sampling.repetition_penalty) if sampling.repetition_penalty != 1 else logits
    )
    if any(bends):
        rows = [row if bend is None else bend(row.clone()) for row, bend in zip(asked, bends, strict=True)]
        asked = torch.stack(rows)
    if sampling.temperature > 0:
        tokens = drawn(shares_of(asked, sampling), keys)
    elif asked is not logits:
        tokens = asked.argmax(dim=-1)
    logprobs: list[float | None] = [None] * len(logits)
    others: list[list[tuple[int, float]]] = [[] for _ in logprobs]
    if sampling.logprobs:
        total = logits.logsumexp(dim=-1)
        logprobs = (logits.gather(1, tokens[:, None])[:, 0] - total).tolist()
        best = logits.topk(min(likeliest, logits.shape[-1]))
        values = (best.values - total[:, None]).tolist()
        others = [list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), values, strict=True)]
    found = zip(tokens.tolist(), logprobs, others, sound, strict=True)
    return [Drawn(token, logprob, more) if fine else None for token, logprob, more, fine in found]


def penalised(logits: Tensor, said: Sequence[Tensor], penalty: float) -> Tensor:
    """A copy of ``logits`` in which what was said is less likely for a ``penalty`` above 1: positive ones are
    divided by it, negative ones multiplied.  Keskar et al. 2019 (arXiv 1909.05858), section 4.1."""
    logits = logits.clone()
    for row, tokens in zip(logits, said, strict=True):
        own = row[tokens]
        row[tokens] = torch.where(own < 0, own * penalty, own / penalty)
    return logits


def shares_of(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The likelihoods to draw from (rows, candidates), 0 for what is left out, and the tokens that they are
    of; None if these are all in their order.

    As in transformers: the temperature, then ``top_k``, then ``top_p`` of what is left (Holtzman et al. 2020,
    arXiv 1904.09751), then ``min_p`` (Nguyen et al. 2025, arXiv 2407.01082)."""
    shares = torch.softmax(logits / sampling.temperature, dim=-1)
    vocabulary = shares.shape[-1]
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    if top_k == vocabulary and sampling.top_p == 1:
        return _without_unlikely(shares, sampling.min_p), None
    is_cut = top_k < vocabulary
    best, tokens = shares.topk(top_k if is_cut else min(vocabulary, CANDIDATES), dim=-1)
    if is_cut:
        best = best / best.sum(dim=-1, keepdim=True)
    elif bool((best.sum(dim=-1) < sampling.top_p).any()):
        best, tokens = shares.sort(dim=-1, descending=True)
    before = best.cumsum(dim=-1) - best
    best = best.masked_fill(before >= sampling.top_p, 0) if sampling.top_p < 1 else best
    return _without_unlikely(best, sampling.min_p), tokens


def _without_unlikely(shares: Tensor, min_p: float) -> Tensor:
    if not min_p:
        return shares
    return shares.masked_fill(shares < min_p * shares.max(dim=-1, keepdim=True).values, 0)


def drawn(candidates: tuple[Tensor, Tensor | None], keys: Sequence[int]) -> Tensor:
    """A token of each row, drawn by the shares: the one whose logarithm and noise are the largest together
    (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).

    The noise of a token hangs on the row's key and on the token alone, so what is rounded otherwise changes
    a draw only where two are as good as equal."""
    shares, tokens = candidates
    if tokens is None:
        tokens = torch.arange(shares.shape[-1], device=shares.device).expand_as(shares)
    words = mixed((tokens + 1) * GAMMA + torch.tensor(keys, device=shares.device)[:, None])
    uniform = ((words & UNIT) + 0.5) / (UNIT + 1)
    scores = shares.double().log() - uniform.double().log().neg().log()
    return tokens.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0]
