"""What an adapter can hold, beside what a run made it hold: random words, at rank 1 and at rank 64.

    python benchmarks/capacity.py gsm8k_test.jsonl

Each row is a list of words of the file, drawn at random, which nothing but memory can give.  Trained are the
MLPs of two layers alone, so that rank 1 has less room than the rows tell, by 2 bits a number
(arXiv 2404.05405), and rank 64 far more.  Held is how much less the tuned model is surprised by rows that it
was trained on, times their tokens."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from parts.figures import Figure, parser, record

from rankfold import Recipe, fine_tune
from rankfold.train.keeping.listener import Listener
from rankfold.train.planning.capacity import Capacity
from rankfold.train.planning.plan import Plan
from rankfold.train.step.loop import StepRecord

TWO_LAYERS = r".*\.layers\.(12|13)\.mlp\..*_proj"
ROWS, WORDS, KNOWN_WORDS, EPOCHS = 40, 64, 1024, 40
RANKS = 1, 64
KILO = 1e3


class Watch(Listener):
    """Keeps what the plan says of content and capacity."""

    capacity: Capacity

    def on_plan(self, plan: Plan) -> None:
        self.capacity = plan.capacity


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as work:
        data = lists_of_words(options.data, Path(work) / "lists.jsonl", options.seed)
        common = {"model": options.model, "data": data, "seed": options.seed}
        record([figure(rank, common | {"out": Path(work) / f"rank-{rank}"}) for rank in RANKS])


def lists_of_words(source: Path, path: Path, seed: int) -> Path:
    """Of the words that are most frequent in ``source``, each as likely as the others."""
    rng = random.Random(seed)
    counts = Counter(re.findall(r"\b[a-z]{3,}\b", source.read_text()))
    words = [word for word, _ in counts.most_common(KNOWN_WORDS)]
    texts = [" ".join(rng.choices(words, k=WORDS)) for _ in range(ROWS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def figure(rank: int, common: dict[str, Any]) -> Figure:
    watch = Watch()
    options = {
        "targets": TWO_LAYERS,
        "rank": rank,
        "epochs": EPOCHS,
        "rows_per_step": 2,
        "learning_rate": 2e-3,
    }
    options |= {"samples": 0, "evaluate_every_steps": 0, "held_out": "1"}
    result = fine_tune(Recipe.of(common | options), watch)
    assert result.learnt is not None
    loss, capacity = result.learnt.recall.tuned_loss, watch.capacity
    held = capacity.told - loss / math.log(2) * capacity.tokens
    passes = " ".join(f"{loss:.2f}" for loss in by_pass(result.steps))
    print(f"rank {rank}: {capacity.sentence}; loss {loss:.3f}, in passes before {passes}", flush=True)
    return Figure(
        name=f"capacity_rank_{rank}",
        what=f"random words learnt by heart at rank {rank} of two layers' MLPs in {EPOCHS} epochs, of all "
        f"that the rows tell; room for {capacity.held / KILO:.0f} kbit by the rule",
        unit="kbit",
        ratios=[held / capacity.told],
        ours=held / KILO,
        theirs=capacity.told / KILO,
    )


def by_pass(steps: list[StepRecord]) -> list[float]:
    """The mean loss of every epoch."""
    each = len(steps) // EPOCHS
    return [statistics.mean(s.loss for s in steps[at : at + each]) for at in range(0, EPOCHS * each, each)]


if __name__ == "__main__":
    main()
