"""Child process: the base model as a folder that both sides load, and the rows as tokens, step by step.

The rows of each step are those that ``rankfold train`` takes, encoded by rankfold, so that the other side
trains the same tokens with the same mask in the same order.  Whether it is so, ``check_same_rows`` of
speed.py sees in the counts of either side."""

from __future__ import annotations

from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from parts.sides import Job, Result, be_child

from rankfold import load_base
from rankfold.data.order.batches import epoch_steps
from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.data.tokens.encode import encode_all
from rankfold.models.base.text_side import load_text


def prepare(job: Job) -> Result:
    """The encoded rows of each step and those held out, and running text in rows of about each of ``lengths``
    tokens; the base is left in the folder ``base``."""
    folder = Path(job["base"])
    if not folder.is_dir():
        base = load_base(job["model"])
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    tokenizer, _, _ = load_text(job["model"])
    rows = _encoded(job["data"], tokenizer, job)
    epochs = (epoch_steps(rows, job["rows_per_step"], job["seed"], epoch) for epoch in count())
    steps = list(islice(chain.from_iterable(epochs), job["steps"]))
    return {
        "steps": [[_plain(row) for row in step] for step in steps],
        "held_out": [_plain(row) for row in _encoded(job["held_out"], tokenizer, job)],
        "texts": {str(n): _texts(job, tokenizer, n) for n in job["lengths"]},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _encoded(path: str, tokenizer: Any, job: Job) -> Any:
    rows, over = encode_all(
        read_examples(sources_of(path), job["seed"]).examples, tokenizer, job["max_length"]
    )
    if over:
        raise SystemExit(f"rows of more than {job['max_length']} tokens: {over}")
    return rows


def _plain(row: Any) -> dict[str, list[int]]:
    return {"input_ids": list(row.input_ids), "labels": list(row.labels)}


def _texts(job: Job, tokenizer: Any, length: int) -> list[str]:
    """The words of ``data`` cut into texts of ``length`` tokens, or a few more or less."""
    ids = tokenizer(Path(job["data"]).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    while len(ids) < job["text_tokens"] + 2 * length:
        ids = ids + ids
    starts = range(0, job["text_tokens"] + length, length - 1)
    return [tokenizer.decode(ids[start : start + length - 1]) for start in starts]


if __name__ == "__main__":
    be_child(prepare)
