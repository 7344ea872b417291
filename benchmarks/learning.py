"""What is learned in the same time: rankfold against PEFT + transformers.Trainer, on held-out rows.

    python benchmarks/learning.py gsm8k_test.jsonl --minutes 10

The rows are split into training and held-out rows.  Both sides train the same rows in the same order with
the same masks, rank, alpha, targets, peak learning rate, schedule and rows a step, and stop after
``--minutes`` of training, one after the other.  The cosine of the learning rate ends for each side where its
own speed, measured first over a few steps, lets it get in that time: a schedule that counted on more steps
than a side can do would leave its rate high at the end.  Then one function judges both adapters on the same
held-out rows (judge.py).  Prints a table; writes learning.json, results.json and docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parts.figures import HERE, Figure, command_line, machine_line, parser, record
from parts.sides import ChildError, Job, Result, run_child, seconds_per_step, write_rows

SIDES = {"rankfold": "ours", "PEFT + Trainer": "peers"}
RESAMPLES = 2000
MAX_LENGTH = 1024  # tokens; no row is longer


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        job, held_out, device = prepared(options, Path(work))
        print(f"{len(held_out)} rows held out; {options.minutes:g} minutes of training a side", flush=True)
        rounds = []
        for place in range(options.rounds):
            order = list(SIDES.items())[:: -1 if place % 2 else 1]
            ran = {name: train(script, job, options, Path(work)) for name, script in order}
            adapters = {name: result["adapter"] for name, result in ran.items()}
            judged = run_child("judge", job | {"rows": held_out, "adapters": adapters}, Path(work))
            rounds.append({"ran": ran, "judged": judged})
            print_table(rounds[-1])
    write(rounds, options, device)


def parse() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--minutes", type=float, default=10, help="of training, for each side")
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument(
        "--trial-steps", type=int, default=8, help="to measure a side's speed; the first warms up"
    )
    made.add_argument("--rows", type=int, default=8, help="rows a step")
    made.add_argument("--held-out", type=int, default=200, help="rows to judge on")
    made.add_argument("--train", type=int, default=1112, help="rows to train on")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--alpha", type=float, default=32.0)
    made.add_argument("--learning-rate", type=float, default=6e-4)
    made.add_argument("--work", help="folder for temporary files [the system's]")
    return made.parse_args()


def prepared(options: argparse.Namespace, work: Path) -> tuple[Job, list[dict[str, list[int]]], str]:
    """The job that both sides share, the held-out rows as tokens, and the GPU's name if there is one."""
    rows = options.train - options.train % options.rows
    data, held_out = write_rows(options.data, work, rows, options.held_out, options.seed)
    one = work / "one.jsonl"  # judging inside the run is no part of this; it wants one row at least
    one.write_text(held_out.read_text().splitlines()[0] + "\n")
    asked = {"model": options.model, "base": str(work / "base"), "rows_per_step": options.rows}
    asked |= {
        "data": str(data),
        "held_out": str(held_out),
        "seed": options.seed,
        "lengths": [],
        "max_length": MAX_LENGTH,
    }
    found = run_child("prepare", asked | {"steps": rows // options.rows}, work)
    job = {
        "model": str(work / "base"),
        "data": str(data),
        "held_out": str(one),
        "steps": found["steps"],
        "rows_per_step": options.rows,
        "rank": options.rank,
        "alpha": options.alpha,
        "dropout": 0.0,
        "learning_rate": options.learning_rate,
        "schedule": "cosine",
        "max_length": MAX_LENGTH,
        "seed": options.seed,
    }
    return job, found["held_out"], found["device"]


def train(script: str, job: Job, options: argparse.Namespace, work: Path) -> Result:
    """A short trial for the speed, then the run."""
    epoch = len(job["steps"])
    trial = run_child(script, job | {"max_steps": options.trial_steps, "epochs": 1}, work)
    steps = max(1, math.floor(60 * options.minutes / seconds_per_step(trial)))
    if steps > epoch:
        print(f"{script} could do {steps} steps; it gets the {epoch} of one epoch", flush=True)
    steps = min(steps, epoch)
    whole = {"max_steps": steps, "epochs": 1, "max_minutes": options.minutes}
    return run_child(script, job | whole, work) | {"planned_steps": steps}


def held_out_loss(judged: Result, name: str) -> float:
    return float(sum(judged["losses"][name]) / sum(judged["trained"]))


def print_table(measured: dict[str, Result]) -> None:
    judged, ran = measured["judged"], measured["ran"]
    print(f"\n{'':16} {'steps':>9} {'s/step':>7} {'tokens':>9} {'last loss':>10} {'held-out loss':>14}")
    print(f"{'base':16} {'':9} {'':7} {'':9} {'':10} {held_out_loss(judged, 'base'):14.4f}")
    for name, result in ran.items():
        steps = f"{len(result['ends'])}/{result['planned_steps']}"
        done = f"{steps:>9} {seconds_per_step(result):7.2f} {sum(result['tokens']):9,}"
        print(f"{name:16} {done} {result['losses'][-1]:10.4f} {held_out_loss(judged, name):14.4f}")
    print("steps: done and planned; held-out loss: nats a trained token", flush=True)


def gaps(judged: Result, seed: int) -> tuple[float, float]:
    """The 95 % interval of our held-out loss over theirs: a paired bootstrap over rows."""
    draw, rows = random.Random(seed), range(len(judged["trained"]))
    ours, theirs = (judged["losses"][name] for name in SIDES)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(rows, k=len(rows))
        ratios.append(sum(ours[row] for row in drawn) / sum(theirs[row] for row in drawn))
    cut = statistics.quantiles(ratios, n=40)
    return cut[0], cut[-1]


def write(rounds: Sequence[dict[str, Result]], options: argparse.Namespace, device: str) -> None:
    losses = [[held_out_loss(each["judged"], name) for name in SIDES] for each in rounds]
    intervals = [gaps(each["judged"], options.seed) for each in rounds]
    ours, theirs = (statistics.median(side) for side in zip(*losses, strict=True))
    figure = Figure(
        name="held_out_loss",
        what=f"held-out loss after {options.minutes:g} minutes of training, against PEFT + Trainer",
        unit="nats a trained token",
        ratios=[a / b for a, b in losses],
        ours=ours,
        theirs=theirs,
        below=1.0,
        more={"interval_95": [min(i[0] for i in intervals), max(i[1] for i in intervals)]},
    )
    told = {"command": command_line(), "machine": machine_line(device), "rounds": rounds}
    (HERE / "learning.json").write_text(json.dumps(told) + "\n")
    record([figure], device)


if __name__ == "__main__":
    try:
        main()
    except ChildError as failure:
        record([Figure(name="held_out_loss", what="held-out loss", unit="nats", failed=str(failure))])
