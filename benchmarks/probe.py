"""Whether a probed learning rate does better than the usual one: the same run with each, on held-out rows.

    python benchmarks/probe.py gsm8k_test.jsonl [MORE ...]

Of each file two runs of as many steps are made, one at the usual rate and one with ``probe``, which takes
training rows alone to judge rates by.  Told is the difference of their held-out losses with its interval, a
paired bootstrap over the rows; the jokes that come along are always among the files.  The intents of
docs/benchmarks.md are 2,000 rows of PolyAI's banking77, the text as prompt and the category as completion."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from parts.figures import HERE, Figure, record

from rankfold import Recipe, fine_tune
from rankfold.judging.held_out import Comparison
from rankfold.judging.intervals import Interval, interval, resampled
from rankfold.train.keeping.listener import Listener
from rankfold.train.planning.plan import Plan

JOKES = HERE.parent / "src" / "rankfold" / "data" / "cold_jokes" / "train.jsonl"


class Watch(Listener):
    """Keeps the rate of the run."""

    rate = 0.0

    def on_plan(self, plan: Plan) -> None:
        self.rate = plan.settings.learning_rate


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path, nargs="*", help="files of rows beside the jokes")
    made.add_argument("--steps", type=int, default=32)
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as work:
        files = {"jokes": JOKES} | {data.stem: data for data in options.data}
        record([figure(name, data, options.steps, Path(work) / name) for name, data in files.items()])


def figure(name: str, data: Path, steps: int, out: Path) -> Figure:
    usual, usual_rate = run(data, steps, out.with_name(f"{out.name}-usual"), probe=False)
    probed, rate = run(data, steps, out.with_name(f"{out.name}-probed"), probe=True)
    gap = compare_runs(usual, probed)
    told = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
    return Figure(
        name=f"probe_{name}",
        what=f"{name}, {steps} steps: held-out loss at the probed rate {rate:g} to that at the usual "
        f"{usual_rate:g}, {told} nats a token on {usual.rows} rows",
        unit="nats a trained token",
        ratios=[probed.tuned_loss / usual.tuned_loss],
        ours=probed.tuned_loss,
        theirs=usual.tuned_loss,
    )


def run(data: Path, steps: int, out: Path, *, probe: bool) -> tuple[Comparison, float]:
    watch = Watch()
    options: dict[str, Any] = {"data": data, "out": out, "max_steps": steps, "samples": 0, "probe": probe}
    result = fine_tune(Recipe.of(options), watch)
    assert result.comparison is not None
    return result.comparison, watch.rate


def compare_runs(usual: Comparison, probed: Comparison) -> Interval:
    """The gap of the second to the first, in nats a trained token."""
    counts = torch.tensor(usual.row_weights, dtype=torch.float64)
    gaps = torch.tensor(probed.tuned_rows) - torch.tensor(usual.tuned_rows)
    sums = resampled(torch.stack([gaps, counts], dim=1), 0)
    return interval(float(gaps.sum() / counts.sum()), sums[:, 0] / sums[:, 1])


if __name__ == "__main__":
    main()
