"""Speed and memory of training, against PEFT + Trainer, TRL and the matrix products alone.

    python benchmarks/speed.py gsm8k_test.jsonl --minutes 20

A round runs every side once, each in a process of its own; rounds go on as long as another one fits into
``--minutes``.  Every figure is a median over rounds.  ``--list`` says what would be compared, here or on a
GPU, and runs nothing.  Writes results.json and docs/benchmarks.md; needs the ``test`` extra's packages."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from parts.figures import Figure, parser, record
from parts.goals import GOALS, LONG, SHORT, TRL_SMALLEST, UNITS, Goal
from parts.sides import ROW_LIMIT, ChildError, Job, Result, run_child, tokens_per_second, write_rows

RANK, ALPHA, LEARNING_RATE = 8, 16.0, 4e-4
CURVE_STEPS = 20
ADAPTER_PAIRS = 5
TRL_CHOICES = ("packed", "padding_free", "padded")


ONCE = ("loss_curve", "adapters_8")
NAMES = [*(goal.name for goal in GOALS), *ONCE]
SAME_ROWS = [
    ("ours", "peft"),
    ("ours", "max_length"),
    ("ours dropout", "peft dropout"),
    ("ours bfloat16", "peft bfloat16"),
]


def main() -> None:
    options = parse()
    if options.list:
        return tell()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        try:
            bench = Bench(options, Path(work))
        except ChildError as failure:  # no figure without rows
            names = options.only or NAMES
            return record([Figure(name=name, what="", unit="", failed=str(failure)) for name in names])
        record(bench.figures(), bench.device)


def parse() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument(
        "--minutes", type=float, default=20, help="no further round begins that would end later"
    )
    made.add_argument("--max-rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=2, help="steps of a run; the first warms up")
    made.add_argument("--rows", type=int, default=8, help="rows a step")
    made.add_argument("--curve-rows", type=int, default=2, help="rows a step where losses are compared")
    made.add_argument("--work", help="folder for temporary files [the system's]")
    made.add_argument("--only", nargs="+", choices=NAMES, help="measure these figures", metavar="FIGURE")
    made.add_argument("--list", action="store_true", help="say what would be compared")
    return made.parse_args()


def tell() -> None:
    """On a GPU both sides compute in bfloat16 and the memory is the GPU's; all else is the same."""
    print(f"{'figure':34} {'unit':16} {'wanted':>16}  ours against theirs")
    for goal in GOALS:
        wanted = f">= {goal.at_least:.3g}" if goal.at_least else ""
        wanted = f"<= {goal.at_most:.3g}" if goal.at_most else wanted
        print(
            f"{goal.name:34} {UNITS[goal.measure]:16} {wanted:>16}  {goal.ours} / {goal.theirs}: {goal.what}"
        )
    print(f"loss_curve: largest difference to PEFT's losses over {CURVE_STEPS} steps, <= 0.001")
    print("adapters_8: time with eight adapters loaded, one active, to that with one")
    print("On a GPU: the same sides in bfloat16 on both, and the memory allocated on the GPU.")


class Bench:
    """The sides, prepared once: rows, their tokens, and the base as a folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.begun = options, work, time.monotonic()
        self.base = str(work / "base")
        self.common: Job = {
            "model": self.base,
            "rank": RANK,
            "alpha": ALPHA,
            "dropout": 0.0,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "epochs": 1,
            "max_length": ROW_LIMIT,
            "seed": options.seed,
        }
        self.rows = self.prepared("rows", options.rows, options.steps, [SHORT, LONG])
        self.device = str(self.rows["device"])
        self.sides = self.all_sides()
        self.trl: dict[str, str] = {}
        self.once = dict(zip(ONCE, (self.loss_curve, self.many_adapters), strict=True))

    def prepared(self, name: str, rows_per_step: int, steps: int, lengths: Sequence[int] = ()) -> Job:
        """Data for ``steps`` steps: the files for rankfold, and the same rows as tokens for the others."""
        folder = self.work / name
        folder.mkdir()
        data, held_out = write_rows(
            self.options.data, folder, rows_per_step * steps, 1, self.options.seed, short=True
        )
        job = {"data": str(data), "held_out": str(held_out), "rows_per_step": rows_per_step}
        asked = {"model": self.options.model, "base": self.base, "steps": steps, "seed": self.options.seed}
        asked["max_length"] = ROW_LIMIT
        texts = {"lengths": list(lengths), "text_tokens": max(self.options.rows * SHORT, LONG) * steps}
        found = run_child("prepare", job | asked | texts, self.work)
        for length, (_, *texts) in found["texts"].items():
            write_texts(folder / f"{length}.jsonl", texts)
        write_texts(folder / "text.jsonl", [texts[0] for texts in found["texts"].values()][:1])
        return job | {"steps": found["steps"], "max_steps": steps, "device": found["device"]}

    def all_sides(self) -> dict[str, tuple[str, Job]]:
        """The script and the job of each side, in the order of a round: who is compared stands together."""
        job = self.common | self.rows
        folder = Path(job["data"]).parent
        text = job | {"held_out": str(folder / "text.jsonl"), "max_length": 2 * LONG}
        long_rows = max(1, self.options.rows * SHORT // LONG)
        return {
            "roofline": ("roofline", job),
            "roofline rank 64": ("roofline", job | {"rank": 64}),
            "roofline bfloat16": ("roofline", job | {"precision": "bfloat16"}),
            "ours": ("ours", job),
            "peft": ("peers", job),
            "max_length": ("peers", job | {"padding": "max_length"}),
            "trl": ("peers", job | {"trl": TRL_CHOICES[0]}),
            "ours recomputed": ("ours", job | {"activation_checkpointing": True}),
            "ours rank 64": ("ours", job | {"rank": 64, "alpha": 8 * ALPHA}),
            "ours dropout": ("ours", job | {"dropout": 0.1}),
            "peft dropout": ("peers", job | {"dropout": 0.1}),
            "ours bfloat16": ("ours", job | {"precision": "bfloat16"}),
            "peft bfloat16": ("peers", job | {"precision": "bfloat16"}),
            "ours compile": ("ours", job | {"compile": True}),
            "ours short": ("ours", text | {"data": str(folder / f"{SHORT}.jsonl")}),
            "ours long": ("ours", text | {"data": str(folder / f"{LONG}.jsonl"), "rows_per_step": long_rows}),
        }

    def run(self, side: str, script: str, job: Job) -> Result:
        """The result of one process; where it failed, a result that says so."""
        started = time.monotonic()
        try:
            result = run_child(script, job, self.work)
        except ChildError as failure:
            print(f"  {side:14} FAILED: {failure}", flush=True)
            return {"failed": str(failure)}
        told = f"{speed_of(result):9,.1f} tokens/s" if "tokens" in result else ""
        told += f", {result['gigaflops']:,.0f} GFLOP/s" if "gigaflops" in result else ""
        memory = f"{result['training_bytes'] / 1e9:7.2f} GB" if "training_bytes" in result else ""
        print(f"  {side:14} {told} {memory}  ({time.monotonic() - started:.0f} s in all)", flush=True)
        return result

    def figures(self) -> list[Figure]:
        """What is measured once, then rounds of all sides until the time is used."""
        names = self.options.only or NAMES
        once = [measure() for name, measure in self.once.items() if name in names]
        goals = [goal for goal in GOALS if goal.name in names]
        if not goals:
            return once
        wanted = {side for goal in goals for side in (goal.ours, goal.theirs)}
        asked_trl = not wanted.isdisjoint(("trl", TRL_SMALLEST))
        done = self.choose_trl() if asked_trl else {}  # by then TRL has had its turn in the first round
        rounds: list[dict[str, Result]] = []
        longest = 0.0
        while len(rounds) < self.options.max_rounds and (not rounds or self.seconds_left() > longest):
            print(f"round {len(rounds) + 1}", flush=True)
            started = time.monotonic()
            for side, (script, job) in self.sides.items():
                if side in wanted - done.keys():
                    done[side] = self.run(side, script, job)
            refuse_other_rows(done)
            rounds.append(done)
            done = {}
            longest = max(longest, time.monotonic() - started)
        goals = [
            replace(goal, what=f"{goal.what} ({self.trl[goal.theirs]})") if goal.theirs in self.trl else goal
            for goal in goals
        ]
        return [*(figure_of(goal, rounds) for goal in goals), *once]

    def seconds_left(self) -> float:
        return 60 * float(self.options.minutes) - (time.monotonic() - self.begun)

    def choose_trl(self) -> dict[str, Result]:
        """TRL's settings, tried once each: the fastest, measured in later rounds too, and the smallest."""
        print("TRL's settings", flush=True)
        _, job = self.sides["trl"]
        tried = {name: self.run(name, "peers", job | {"trl": name}) for name in TRL_CHOICES}
        ended = [name for name, result in tried.items() if "failed" not in result]
        first = TRL_CHOICES[0]
        best = max(ended, key=lambda name: speed_of(tried[name]), default=first)
        least = min(ended, key=lambda name: int(tried[name]["training_bytes"]), default=first)
        self.trl = {"trl": best, TRL_SMALLEST: least}
        self.sides["trl"] = ("peers", job | {"trl": best})
        return {side: tried[name] for side, name in self.trl.items()}

    def loss_curve(self) -> Figure:
        """The largest difference of a step's loss to PEFT's, from the same start on the same rows."""
        print(f"{CURVE_STEPS} steps on either side", flush=True)
        job = self.common | self.prepared("curve", self.options.curve_rows, CURVE_STEPS)
        sides = {"ours": self.run("ours", "ours", job), "peft": self.run("peft", "peers", job)}
        refuse_other_rows(sides)
        what = f"loss of {CURVE_STEPS} steps of {self.options.curve_rows} rows: largest difference to PEFT's"
        goal = {"name": "loss_curve", "what": what, "unit": "nats a token", "at_most": 1e-3}
        if failed := failure_of(sides.values()):
            return Figure(**goal, failed=failed)
        ours, theirs = (sides[name]["losses"] for name in ("ours", "peft"))
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        last = {"ours": ours[-1], "theirs": theirs[-1]}
        return Figure(**goal, **last, ratios=[apart], more={"losses": {"ours": ours, "theirs": theirs}})

    def many_adapters(self) -> Figure:
        goal = {"name": "adapters_8", "what": "8 adapters loaded, one active, to one loaded"}
        goal |= {"unit": "s forward and backward"}
        job = self.common | self.rows | {"pairs": ADAPTER_PAIRS}
        result = self.run("adapters", "adapters", job)
        if failed := failure_of([result]):
            return Figure(**goal, at_most=1.02, failed=failed)
        one, eight = (statistics.median(side) for side in zip(*result["pairs"], strict=True))
        ratios = [eight / one for one, eight in result["pairs"]]
        return Figure(**goal, at_most=1.02, ratios=ratios, ours=eight, theirs=one)


def write_texts(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def speed_of(result: Result) -> float:
    """Tokens a second; of the roofline, of its one mean step."""
    return result["tokens"] / result["seconds"] if "seconds" in result else tokens_per_second(result)


def failure_of(results: Iterable[Result]) -> str:
    return "; ".join(result["failed"] for result in results if "failed" in result)


def refuse_other_rows(results: dict[str, Result]) -> None:
    """Mark a peer as failed that did not train the rows of our steps, or not as many weights."""
    for ours, peer in SAME_ROWS:
        pair = [results.get(ours, {}), results.get(peer, {})]
        if not all("tokens" in result for result in pair):
            continue
        for name in ("tokens", "trained_tokens", "trainable"):
            if pair[0][name] != pair[1][name]:
                results[peer] = {"failed": f"{name}: {pair[1][name]} here, {pair[0][name]} in ours"}


MEASURES = {
    "speed": speed_of,
    "memory": lambda result: result["training_bytes"] / 1e9,
    "time": lambda result: 1000 / speed_of(result),
}


def figure_of(goal: Goal, rounds: Sequence[dict[str, Result]]) -> Figure:
    """The median over the rounds in which both sides ended well."""
    pairs = [(done[goal.ours], done[goal.theirs]) for done in rounds if goal.theirs in done]
    known = {"name": goal.name, "what": goal.what, "unit": UNITS[goal.measure]}
    known |= {"at_least": goal.at_least, "at_most": goal.at_most}
    failed = failure_of(result for pair in pairs for result in pair)
    if failed:
        return Figure(**known, failed=failed)
    values = [[MEASURES[goal.measure](result) for result in pair] for pair in pairs]
    ours, theirs = (statistics.median(side) for side in zip(*values, strict=True))
    return Figure(**known, ratios=[a / b for a, b in values], ours=ours, theirs=theirs)


if __name__ == "__main__":
    main()
