"""Two ideas that rankfold does not have, measured: what they would bring at most.

    python benchmarks/tried.py gsm8k_test.jsonl --minutes 3

A trunk kept on disk: with adapters in the upper third of the layers only, the output of the lower ones could
be computed once and read in later epochs.  Timed on a model without the lower layers, which is the best that
reading could do; then both adapters are trained as long, and what they learned is compared.  The steps of the
upper one are as many as it would make in that time, the first epoch's full price left out.

Several adapters in one run: they would share the products of the base.  More tokens in each product is all
that it can bring, so a micro-batch four times as large is timed beside the usual one."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import Figure, parser, record
from sides import write_rows

from rankfold import LoraConfig, Recipe, fine_tune, get_peft_model, load_base
from rankfold.data.batches import MICRO_BATCH_TOKENS
from rankfold.data.encode import EncodedRow
from rankfold.data.pack import Batching
from rankfold.models.precision import choose_precision, default_device
from rankfold.models.rows_apart import attend_rows_apart
from rankfold.train.trial import Trial

HELD_OUT = 100
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 4e-4
ADAPTERS = 4


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--minutes", type=float, default=3, help="of training, of each side")
    made.add_argument("--pairs", type=int, default=5)
    options = made.parse_args()
    rows = encoded(options)
    sides = {name: trial(options, rows, name) for name in ("all", "upper", "upper alone")}
    speeds = [
        {name: side.tokens_per_second(packed()) for name, side in sides.items()} for _ in range(options.pairs)
    ]
    record([*trunk(options, speeds), several(options, sides["all"])])


def packed(times: int = 1) -> Batching:
    return Batching("packed", tokens=times * MICRO_BATCH_TOKENS)


def encoded(options: argparse.Namespace) -> list[EncodedRow]:
    """The first rows of the file as tokens, all of them trained."""
    tokenizer = load_base(options.model).tokenizer
    lines = options.data.read_text(encoding="utf-8").splitlines()[:64]
    texts = [json.loads(line)["question"] + json.loads(line)["answer"] for line in lines]
    ids = [tokenizer(text).input_ids for text in texts]
    return [EncodedRow(str(place), row, row) for place, row in enumerate(ids)]


def trial(options: argparse.Namespace, rows: list[EncodedRow], name: str) -> Trial:
    """The base with an adapter on all layers, on the upper third, or on the upper third without the rest."""
    precision = choose_precision(None, default_device())
    model: Any = load_base(options.model, precision).model
    attend_rows_apart(model)
    first = first_adapted(model)
    if name == "upper alone":
        model.model.layers = model.model.layers[first:]
    targets = upper(model, first) if name == "upper" else "all-linear"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    return Trial(get_peft_model(model, config), rows, 0, precision)


def first_adapted(model: Any) -> int:
    return len(model.model.layers) * 2 // 3


def upper(model: Any, first: int) -> str:
    numbers = "|".join(str(number) for number in range(first, len(model.model.layers)))
    return rf".*layers\.({numbers})\..*_proj"


def trunk(options: argparse.Namespace, speeds: list[dict[str, float]]) -> list[Figure]:
    def figure(name: str, what: str, ours: str, theirs: str) -> Figure:
        return Figure(
            name=name,
            what=what,
            unit="tokens/s",
            ratios=[each[ours] / each[theirs] for each in speeds],
            ours=statistics.median(each[ours] for each in speeds),
            theirs=statistics.median(each[theirs] for each in speeds),
        )

    read = figure(
        "trunk_kept", "adapters in the upper third: trunk read, to computed", "upper alone", "upper"
    )
    faster = figure("trunk_kept_all", "the same, to adapters in all layers", "upper alone", "all")
    base = load_base(options.model).model
    with tempfile.TemporaryDirectory() as work:
        common = settings(options, Path(work))
        whole = fine_tune(Recipe.of(common | {"out": Path(work) / "all", "max_minutes": options.minutes}))
        steps = round(len(whole.steps) * (faster.ratio or 1))
        print(f"{len(whole.steps)} steps with adapters in all layers, {steps} in the upper third", flush=True)
        targets = upper(base, first_adapted(base))
        part = fine_tune(
            Recipe.of(common | {"out": Path(work) / "upper", "max_steps": steps, "targets": targets})
        )
    losses = [run.comparison.tuned_loss for run in (part, whole) if run.comparison]
    what = "held-out loss of the upper third to all layers, trained as long"
    learned = Figure(
        name="trunk_kept_loss",
        what=what,
        unit="nats a token",
        ratios=[losses[0] / losses[1]],
        ours=losses[0],
        theirs=losses[1],
    )
    return [read, faster, learned]


def settings(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    count = sum(1 for _ in options.data.open(encoding="utf-8")) - HELD_OUT - 20
    data, held_out = write_rows(options.data, work, count, HELD_OUT, options.seed)
    made = {"model": options.model, "data": str(data), "held_out": str(held_out), "schedule": "constant"}
    made |= {"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "epochs": 3, "samples": 0}
    return made | {"evaluate_every_steps": 0, "save_every_steps": 10_000, "seed": options.seed}


def several(options: argparse.Namespace, side: Trial) -> Figure:
    longer = replace(side, rows=[*side.rows] * ADAPTERS)
    pairs = [
        [longer.tokens_per_second(packed(times)) for times in (ADAPTERS, 1)] for _ in range(options.pairs)
    ]
    ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    return Figure(
        name="adapters_together",
        what=f"a micro-batch {ADAPTERS} times as large, as so many adapters in one run would have",
        unit="tokens/s",
        ratios=[a / b for a, b in pairs],
        ours=ours,
        theirs=theirs,
    )


if __name__ == "__main__":
    main()
