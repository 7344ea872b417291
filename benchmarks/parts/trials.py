"""What the measuring scripts ask of a trial: the speed of a full micro-batch."""

from __future__ import annotations

import argparse
import heapq
import json
import time
from typing import Any

from rankfold import LoraConfig, get_peft_model, load_base
from rankfold.data.order.batches import MICRO_BATCH_TOKENS, MicroBatch
from rankfold.data.order.batching import Batching, Packed
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.models.base.precision import Precision
from rankfold.models.running.fusing import fuse
from rankfold.models.running.rows_apart import attend_rows_apart
from rankfold.train.planning.trial import Trial

LONGEST_ROWS = 64  # enough to fill a micro-batch with short rows
RANK, ALPHA = 8, 16.0


def tokens_per_second(trial: Trial, batching: Batching) -> float:
    """Of the longest micro-batch, the second time it runs."""
    rows = longest(trial, batching)
    trial.seconds(rows, batching)
    started = time.perf_counter()
    trial.seconds(rows, batching)
    return sum(map(len, rows)) / (time.perf_counter() - started)


def longest(trial: Trial, batching: Batching) -> MicroBatch:
    """The micro-batch of the longest rows."""
    rows = heapq.nlargest(LONGEST_ROWS, trial.rows, key=len)
    return max(batching.cut(rows), key=lambda group: len(group[0]))


def packed(times: int = 1) -> Packed:
    return Packed(tokens=times * MICRO_BATCH_TOKENS)


def encoded(options: argparse.Namespace) -> list[EncodedRow]:
    """The first rows of the file as tokens, of which the answer's are trained."""
    tokenizer = load_base(options.model).tokenizer
    lines = map(json.loads, options.data.read_text(encoding="utf-8").splitlines()[:64])
    pairs = [[tokenizer(line[name]).input_ids for name in ("question", "answer")] for line in lines]
    return [
        EncodedRow(str(place), asked + answered, [IGNORE] * len(asked) + answered)
        for place, (asked, answered) in enumerate(pairs)
    ]


def trial(options: argparse.Namespace, rows: list[EncodedRow], name: str, precision: Precision) -> Trial:
    """The base with an adapter on all layers, on the upper third, or on the upper third without the rest."""
    model: Any = load_base(options.model, precision).model
    attend_rows_apart(model)
    first = first_adapted(model)
    if name == "upper alone":
        model.model.layers = model.model.layers[first:]
    targets = upper(model, first) if name == "upper" else "all-linear"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    print(fuse(adapted, precision.compute))
    return Trial(adapted, rows, 0, precision)


def first_adapted(model: Any) -> int:
    return len(model.model.layers) * 2 // 3


def upper(model: Any, first: int) -> str:
    numbers = "|".join(str(number) for number in range(first, len(model.model.layers)))
    return rf".*layers\.({numbers})\..*_proj"
