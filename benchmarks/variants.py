"""What a start or a variant of LoRA buys: each at the best of three rates, on the same rows, in equal steps.

    python benchmarks/variants.py banking77.jsonl
    python benchmarks/variants.py gsm8k_test.jsonl --rows 3 --longest 192 --judging 60

Of the file some rows are trained on, some choose the rate (at the first seed), and others, which chose
nothing, judge.  A seed draws the factors and the order of the rows, the same for all variants.  Told is the
gap to plain LoRA on the same rows: its mean over the seeds, with a paired bootstrap over the rows.

What is done is kept in ``variants.json``, and a later call goes on from there; docs/variants.md is written
from it.  banking77.jsonl are 2,000 rows of PolyAI's banking77, the text as prompt and the category as
completion."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from parts.figures import HERE, command_line, machine_line

from rankfold import Recipe
from rankfold.data.order.batches import epoch_steps
from rankfold.data.order.batching import Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import TrainingError
from rankfold.judging.intervals import interval, resampled
from rankfold.judging.losses import target_logits
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.planning.plan import Plan, make_plan
from rankfold.train.planning.rows import prepare
from rankfold.train.step.average import set_weights
from rankfold.train.step.loop import Trainer
from rankfold.train.step.method import method_of
from rankfold.train.step.pace import Pace

KEPT, PAGE = HERE / "variants.json", HERE.parent / "docs" / "variants.md"
RANK, PRECISION = 16, "bfloat16"
STEPS, SEEDS, USUAL_RATE, FACTOR = 24, 3, 6e-4, 3
CHOOSING = 3  # rows that judge to one that chooses the rate
PLAIN, PLAIN_4_BITS = "plain", "plain, 4 bits"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rsLoRA": {"use_rslora": True},
    "LoRA+": {"b_rate_factor": 16},
    "DoRA": {"use_dora": True},
    "PiSSA": {"start": "pissa"},
    "OLoRA": {"start": "olora"},
    "EVA": {"start": "eva"},
    "LoRA-GA": {"start": "lora-ga"},
    PLAIN_4_BITS: {"stored": "nf4"},
    "LoftQ, 4 bits": {"stored": "nf4", "start": "loftq"},
    "CorDA": {"start": "corda"},
}
IN_4_BITS = {name for name, options in VARIANTS.items() if "stored" in options}
HEAD = f"""# What a variant buys

Written by `benchmarks/variants.py`; not edited by hand.

SmolLM2-135M-Instruct, {STEPS} steps, LoRA of rank {RANK} and alpha {2 * RANK} on all linear layers, in
bfloat16. Each variant has, of three rates, the one at which it did best on rows apart, at the first of
{SEEDS} seeds; other rows judge. A seed draws the factors and the order of the rows, and is the same for all.
The gap is that of the held-out loss to plain LoRA's, in nats a token of the answers: the mean over the seeds
with its 95 % interval over the rows (paired bootstrap), and each seed's. Below 0 is better. What trains on
weights of 4 bits (nf4) stands beside plain LoRA on such. `right` are answers of which each token is the
likeliest.
"""
TABLE = (
    "| variant | trained | rate | held-out loss | gap to plain LoRA | of each seed | right |",
    "|---|---|---|---|---|---|---|",
)
Looked = dict[str, list[float]]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path, help="file of rows")
    made.add_argument("--rows", type=int, default=8, help="rows a step")
    made.add_argument("--longest", type=int, default=128, help="tokens of the longest row")
    made.add_argument("--judging", type=int, default=120, help="rows that judge")
    options = made.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    about = {"rows_per_step": options.rows, "longest": options.longest, "judging": options.judging}
    found = kept.setdefault(options.data.stem, about | {"variants": {}})["variants"]
    with tempfile.TemporaryDirectory() as work:
        task = Task(options, Path(work))
        for variant in [name for name in VARIANTS if name not in found]:
            found[variant] = task.judged(variant)
            kept[options.data.stem] |= {"command": command_line(), "machine": machine_line()}
            KEPT.write_text(json.dumps(kept) + "\n")
            PAGE.write_text(page(kept), encoding="utf-8")


class Task:
    """A file of rows, split by chance once: to train on, and held out."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.rows_per_step, self.longest, self.judging = options.rows, options.longest, options.judging
        lines = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        self.train, self.held_out = (
            work / f"{options.data.stem}_{part}.jsonl" for part in ("train", "held_out")
        )
        apart = 4 * self.judging  # some are too long
        self.train.write_text("".join(lines[apart:]), encoding="utf-8")
        self.held_out.write_text("".join(lines[:apart]), encoding="utf-8")

    def recipe(self, variant: str, seed: int) -> Recipe:
        usual = {"data": self.train, "held_out": self.held_out, "out": self.train.with_suffix("")}
        usual |= {"max_length": self.longest, "max_steps": STEPS, "rows_per_step": self.rows_per_step}
        usual |= {"rank": RANK, "alpha": 2 * RANK, "general": "none", "seed": seed}
        return Recipe.of(usual | VARIANTS[variant])

    @cached_property
    def prepared(self) -> Any:
        return prepare(self.recipe(PLAIN, 0))

    def judged(self, variant: str) -> dict[str, Any]:
        """The rate that does best at the first seed, and what the judging rows say of each seed there."""
        tried: dict[float, float] = {}
        seeds: list[Looked] = []
        for seed in range(SEEDS):
            recipe = self.recipe(variant, seed)
            plan = make_plan(recipe, self.prepared, Precision.of(PRECISION), Processes())
            judging = plan.held_out[: self.judging]
            choosing = plan.held_out[self.judging :][: self.judging // CHOOSING]
            assert len(choosing) == self.judging // CHOOSING, f"{len(plan.held_out)} rows are held out"
            if not seed:
                tried = three_rates(lambda rate: sum(looked_at(plan, choosing, rate)["nats"]))  # noqa: B023
                best = min(tried, key=lambda rate: tried[rate])
            seeds.append(looked_at(plan, judging, best))
            print(self.train.stem, variant, seed, best, sum(seeds[-1]["nats"]), flush=True)
        numbers, _ = plan.model.get_nb_trainable_parameters()
        tokens = [row.weight for row in judging]
        return {"rate": best, "tried": tried, "seeds": seeds, "tokens": tokens, "numbers": numbers}


def three_rates(nats: Callable[[float], float]) -> dict[float, float]:
    """The usual rate, a higher one, and one more on the side of the better of these."""
    tried = {rate: nats(rate) for rate in (USUAL_RATE, FACTOR * USUAL_RATE)}
    higher = tried[FACTOR * USUAL_RATE] < tried[USUAL_RATE]
    rate = USUAL_RATE * (FACTOR**2 if higher else 1 / FACTOR)
    return tried | {rate: nats(rate)}


def looked_at(plan: Plan, rows: Sequence[EncodedRow], rate: float) -> Looked:
    """What the model makes of ``rows`` after the steps at ``rate``; its weights are then as they were."""
    weights = {name: p for name, p in plan.model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in weights.items()}
    method = method_of(plan.recipe, replace(plan.settings, learning_rate=rate), plan.batching, plan.precision)
    trainer = Trainer(plan.model, plan.pad_id, Pace(STEPS), method, plan.processes)
    rows_per_step, seed = plan.settings.rows_per_step, plan.recipe.seed
    epochs = (epoch_steps(plan.train, rows_per_step, seed, epoch) for epoch in count())
    try:
        trainer.run(islice(chain.from_iterable(epochs), STEPS), lambda _: None, lambda: False)
        return answers(plan, rows)
    except TrainingError:
        return {"nats": [float("inf")] * len(rows), "right": [0.0] * len(rows)}
    finally:
        set_weights(weights, start)


@torch.no_grad()
def answers(plan: Plan, rows: Sequence[EncodedRow]) -> Looked:
    """Of each row the nats of its answer, and whether each of its tokens is the likeliest: then greedy
    decoding gives that very answer."""
    plan.model.eval()
    nats, right = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows))
    places = {id(row): place for place, row in enumerate(rows)}
    for group in Padded().cut(rows):
        batch = Padded().collate(group, plan.pad_id, plan.model.device)
        with plan.precision.autocast(plan.model.device):
            logits = torch.cat(list(target_logits(plan.model, batch)))
        own = torch.tensor([places[id(row)] for row in group])[batch.targets.rows]
        told = logits.log_softmax(-1).gather(1, batch.targets.tokens[:, None])[:, 0]
        nats.index_add_(0, own, -told.double())
        right.index_put_((own[logits.argmax(-1) != batch.targets.tokens],), torch.tensor(0.0))
    plan.model.train()
    return {"nats": nats.tolist(), "right": right.tolist()}


def page(kept: dict[str, dict[str, Any]]) -> str:
    lines = [HEAD]
    for name, task in kept.items():
        rows = (
            f"{task['rows_per_step']} rows a step, {task['longest']} tokens at most; {task['judging']} judge"
        )
        lines += [f"## {name}\n\n{rows}.\n", *TABLE]
        lines += [line(variant, task["variants"]) for variant in VARIANTS if variant in task["variants"]]
        lines.append(f"\n`{task['command']}` on {task['machine']}.\n")
    return "\n".join(lines)


def line(variant: str, found: dict[str, dict[str, Any]]) -> str:
    """A row of the table: the rows' gaps are means over the seeds, and the interval is over the rows."""
    own, plain = found[variant], found[PLAIN_4_BITS if variant in IN_4_BITS else PLAIN]
    tokens = torch.tensor(own["tokens"], dtype=torch.float64)
    nats, usual = (torch.tensor([each["nats"] for each in side["seeds"]]) for side in (own, plain))
    gaps = (nats - usual).double()
    sums = resampled(torch.stack([gaps.mean(0), tokens], dim=1), 0)
    gap = interval(float(gaps.mean(0).sum() / tokens.sum()), sums[:, 0] / sums[:, 1])
    seeds = ", ".join(f"{float(each.sum() / tokens.sum()):+.3f}" for each in gaps)
    told = [f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})", seeds] if own is not plain else ["", ""]
    tried = [*map(float, own["tried"])]
    edge = {min(tried): ", the lowest tried", max(tried): ", the highest tried"}.get(own["rate"], "")
    loss = float(nats.mean(0).sum() / tokens.sum())
    right = statistics.mean(chain.from_iterable(each["right"] for each in own["seeds"]))
    numbers = f"{own['numbers'] / 1e6:.2f} M"
    cells = [variant, numbers, f"{own['rate']:.2g}{edge}", f"{loss:.3f}", *told, f"{right:.1%}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
