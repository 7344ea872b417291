"""How many rows a second are rendered, masked and tokenised.

    python benchmarks/tokenising.py ROWS.jsonl --rows 2000

ROWS.jsonl has rows of ``question`` and ``answer`` (GSM8K's) or whatever ``rankfold train`` reads; they are
repeated, each time with other words at the front, until there are ``--rows`` of them."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from rankfold.data.shapes.example import Example, Message
from rankfold.data.tokens.encode import encode_each
from rankfold.errors import DataError
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.load import load_base


def read_examples(path: Path, count: int) -> list[Example]:
    """``count`` conversations of one question and one answer."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    pairs = [(row["question"], row["answer"]) for row in rows]
    return [
        Example(
            f"{path.name}:{place + 1}",
            (
                Message("user", (f"{place}. {pairs[place % len(pairs)][0]}",)),
                Message("assistant", (f"{pairs[place % len(pairs)][1]} ({place})",)),
            ),
        )
        for place in range(count)
    ]


def processor_seconds() -> float:
    """Of this process and the template worker, which has ended by then or not (then it is left out)."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    tokenizer = load_base(options.model).tokenizer
    examples = read_examples(options.data, options.rows)
    list(encode_each(examples[:1], tokenizer))  # starts the worker
    started, processor = time.perf_counter(), processor_seconds()
    rows = tokens = 0
    for example, encoded in encode_each(examples, tokenizer):
        if isinstance(encoded, DataError):
            raise SystemExit(f"{example.origin}: {encoded}")
        rows += len(encoded)
        tokens += sum(map(len, encoded))
    seconds = time.perf_counter() - started
    print(
        f"{rows:,} rows, {tokens:,} tokens in {seconds:.2f} s: {rows / seconds:,.0f} rows/s, "
        f"{tokens / seconds:,.0f} tokens/s; {processor_seconds() - processor:.2f} s of processor time here"
    )


if __name__ == "__main__":
    main()
