"""What one model does on the rows: its losses, its answers, its choices."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankfold.data.order.batching import pad_id_of
from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import IGNORE, EncodedRow, encode_all
from rankfold.data.tokens.mask import TrainOn
from rankfold.errors import ConfigError, bullet_list
from rankfold.judging.choices import likeliest
from rankfold.judging.losses import row_losses
from rankfold.judging.metrics import Judged
from rankfold.judging.request import EvalRequest
from rankfold.judging.rows import EvalData
from rankfold.models.answering.answerable import context_of
from rankfold.models.answering.answers import in_turn
from rankfold.models.answering.asked import Question
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.messages.images import image_reader

OnProgress = Callable[[str, int, int], object]  # what is done, how many rows of how many
AT_ONCE = 128  # rows whose loss is computed between two calls
ANSWER_TOKENS, BESIDE_LABELS = 128, 8  # of an answer at most; of one that is a label, beside the label's
MISSING = "error"  # the finish reason of a row that could not be answered


def judge(base: Base, data: EvalData, request: EvalRequest, on_progress: OnProgress) -> Judged:
    """A row that ``base`` cannot read whole has a loss of NaN; one that it cannot be asked, the finish reason
    "error".  Raises RankfoldError."""
    started = time.perf_counter()
    judged = read_rows(base, data.examples, request.train_on, on_progress)
    count = len(data.rows)
    if data.chooses:
        done = iter(range(1, count + 1))
        choices = [row.choices for row in data.rows]
        judged.chosen = likeliest(
            base, data.examples, choices, longest_of(base), lambda: on_progress("choosing", next(done), count)
        )
    if data.generates:
        _answer(base, data, request, judged, on_progress)
    judged.seconds = time.perf_counter() - started
    return judged


def answered(data: EvalData, column: str) -> Judged:
    """The answers in a column of the rows, which no model here has given.  Raises ConfigError."""
    given = [row.values.get(column) for row in data.rows]
    missing = [
        f"{row.origin}: {value!r}"
        for row, value in zip(data.rows, given, strict=True)
        if not isinstance(value, str)
    ]
    if len(missing) == len(given):
        raise ConfigError(bullet_list(f"column {column!r} holds no answers:", missing, shown=3))
    nothing = torch.zeros(len(given), dtype=torch.float64)
    return Judged(
        losses=nothing,
        tokens=nothing,
        text_bytes=nothing,
        answers=[value if isinstance(value, str) else "" for value in given],
        finish_reasons=["" if isinstance(value, str) else MISSING for value in given],
    )


def longest_of(base: Base) -> int:
    return int(min(context_of(base.model), sys.maxsize))


def read_rows(
    base: Base, examples: Sequence[Example], train_on: TrainOn, on_progress: OnProgress = lambda *_: None
) -> Judged:
    """Losses, tokens and bytes of each of ``examples``, which may have become several rows of tokens."""
    sees = any(message.images for example in examples for message in example.messages)
    reader = image_reader(base.processor) if sees and base.processor is not None else None
    encoded, _ = encode_all(examples, base.tokenizer, longest_of(base), train_on, reader)
    encoded.sort(key=len)
    places = {example.origin: place for place, example in enumerate(examples)}
    sums = torch.zeros(3, len(examples), dtype=torch.float64)
    pad_id = pad_id_of(base.tokenizer)
    for start in range(0, len(encoded), AT_ONCE):
        part = encoded[start : start + AT_ONCE]
        losses = row_losses(base.model, part, pad_id, reader=reader)
        at = torch.tensor([places[row.origin] for row in part])
        sums.index_add_(1, at, torch.stack([losses, *_sizes(part, base)]))
        on_progress("reading", min(start + AT_ONCE, len(encoded)), len(encoded))
    sums[0, sums[1] == 0] = float("nan")
    return Judged(losses=sums[0], tokens=sums[1], text_bytes=sums[2])


def _sizes(rows: Sequence[EncodedRow], base: Base) -> list[Tensor]:
    """What the trained tokens of each row count, and the bytes of their text."""
    texts = [
        base.tokenizer.decode([label for label in row.labels if label != IGNORE], skip_special_tokens=True)
        for row in rows
    ]
    return [
        torch.tensor([row.weight for row in rows], dtype=torch.float64),
        torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64),
    ]


def _answer(
    base: Base, data: EvalData, request: EvalRequest, judged: Judged, on_progress: OnProgress
) -> None:
    most = request.max_new_tokens or _longest_answer(base, data)
    sampling = Sampling(max_new_tokens=most, temperature=0.0)
    questions = [Question(example.prompt, example.tools) for example in data.examples]
    judged.answers, judged.finish_reasons = [""] * len(questions), [MISSING] * len(questions)
    found = in_turn(base, enumerate(questions), sampling, request.at_once)
    for done, (place, answer) in enumerate(found, start=1):
        judged.answers[place], judged.finish_reasons[place] = answer.text, answer.finish_reason
        on_progress("answering", done, len(questions))


def _longest_answer(base: Base, data: EvalData) -> int:
    if data.kind.name != "labels":
        return ANSWER_TOKENS
    return max(len(base.tokenizer(label).input_ids) for label in data.labels) + BESIDE_LABELS
