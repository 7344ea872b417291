"""Which of several answers a model holds for the likeliest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import IGNORE, EncodedRow, encode_all
from rankfold.errors import ConfigError
from rankfold.models.base.base import Base

LOGITS_AT_ONCE = 25 << 20  # 100 MB of float32


def likeliest(
    base: Base,
    examples: Sequence[Example],
    choices: Sequence[Sequence[str]],
    max_length: int,
    on_row: Callable[[], object] = lambda: None,
) -> list[str]:
    """For each of ``examples`` the one of its ``choices`` that is the likeliest whole answer, the token that
    ends it among its tokens.

    What the choices of a row have in common, the prompt above all, is read once.  Raises ConfigError for
    rows with images, and for a model whose memory of a prompt cannot be copied."""
    if any(message.images for example in examples for message in example.messages):
        raise ConfigError("choice: rows with images are not judged by likelihood here; name other metrics")
    found = []
    for options, rows in zip(choices, _encoded(base, examples, choices, max_length), strict=True):
        found.append(options[int(_log_likelihoods(base.model, rows).argmax())])
        on_row()
    return found


def _encoded(
    base: Base, examples: Sequence[Example], choices: Sequence[Sequence[str]], max_length: int
) -> Iterator[list[EncodedRow]]:
    """Of each example the rows that it would be with each of its choices as the answer."""
    asked = [
        replace(example, messages=(*example.messages[:-1], replace(example.messages[-1], parts=(choice,))))
        for example, options in zip(examples, choices, strict=True)
        for choice in options
    ]
    rows, over = encode_all(asked, base.tokenizer, max_length, "last")
    if over or len(rows) != len(asked):
        raise ConfigError(f"choice: with the longest of its choices a row is too long: {over[0]}")
    left = iter(rows)
    for options in choices:
        yield [next(left) for _ in options]


@torch.inference_mode()
def _log_likelihoods(model: Any, rows: Sequence[EncodedRow]) -> Tensor:
    """The log-likelihood of each row's trained tokens behind what all begin with: (rows), but for what the
    tokens in common add to all."""
    longest = max(map(len, rows))
    if len(rows) == 1:
        return torch.zeros(1)
    columns = zip(*(row.input_ids for row in rows), strict=False)
    shared = max(1, sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns)) - 1)
    read = model(input_ids=torch.tensor([rows[0].input_ids[:shared]], device=model.device), use_cache=True)
    memory = read.past_key_values
    if not hasattr(memory, "batch_repeat_interleave"):
        raise ConfigError(f"choice: {type(memory).__name__}, a memory of this model's, cannot be copied")
    width = longest - shared
    at_once = max(1, LOGITS_AT_ONCE // (width * model.get_input_embeddings().weight.shape[0]))
    found = []
    for start in range(0, len(rows), at_once):
        found.append(_behind(model, memory, rows[start : start + at_once], shared))
    return torch.cat(found)


def _behind(model: Any, memory: Any, rows: Sequence[EncodedRow], shared: int) -> Tensor:
    """The log-likelihoods of the trained tokens of ``rows`` behind the first ``shared``, which are read."""
    width = max(map(len, rows)) - shared

    def padded(lists: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*ids[shared:], *[fill] * (width - len(ids) + shared)] for ids in lists])

    copied = copy.deepcopy(memory)
    copied.batch_repeat_interleave(len(rows))
    ids = padded([row.input_ids for row in rows], 0)
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones(len(rows), shared + width, dtype=torch.long, device=model.device),
        past_key_values=copied,
        use_cache=True,
    ).logits
    labels = padded([row.labels for row in rows], IGNORE)[:, 1:].to(model.device)
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return -losses.double().sum(dim=1).cpu()
