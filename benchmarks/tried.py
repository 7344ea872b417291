"""Two ideas that rankfold does not have, measured: what they would bring at most.

    python benchmarks/tried.py gsm8k_test.jsonl

A trunk kept on disk: with adapters in the upper third of the layers only, the output of the lower ones could
be computed in the first epoch and read in the later ones.  Reading is timed on a model without the lower
layers, which is the best that it could do.  Then an adapter on all layers is trained for ``--epochs``, one on
the upper third for as many as would take that long, and what they learned is compared.

Several adapters in one run: they would share the products of the base.  More tokens in each product is all
that it can bring, so a micro-batch four times as large is timed beside the usual one."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from parts.figures import Figure, parser, record
from parts.sides import NO_SAVES, write_rows
from parts.trials import ALPHA, RANK, encoded, first_adapted, packed, tokens_per_second, trial, upper

from rankfold import Recipe, fine_tune, load_base
from rankfold.models.base.precision import choose_precision, default_device
from rankfold.train.planning.trial import Trial

HELD_OUT = 100
LEARNING_RATE = 4e-4
ADAPTERS = 4


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rows", type=int, default=120, help="to train on")
    made.add_argument("--epochs", type=int, default=3, help="with an adapter on all layers")
    made.add_argument("--pairs", type=int, default=5)
    options = made.parse_args()
    rows = encoded(options)
    precision = choose_precision(None, default_device())
    sides = {name: trial(options, rows, name, precision) for name in ("all", "upper", "upper alone")}
    speeds = [
        {name: tokens_per_second(side, packed()) for name, side in sides.items()}
        for _ in range(options.pairs)
    ]
    record([*trunk(options, speeds), several(options, sides["all"])])


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
    computed = figure("", "", "upper", "all")
    layers = load_base(options.model).model
    targets = upper(layers, first_adapted(layers))
    epochs = epochs_as_long(options.epochs, *(s.ratio or 1 for s in (computed, faster)))
    whole = held_out_loss(options, options.epochs, "all-linear")
    part = held_out_loss(options, epochs, targets)
    learned = Figure(
        name="trunk_kept_loss",
        what=f"held-out loss, {epochs} epochs of the upper third to {options.epochs} of all layers: as long",
        unit="nats a token",
        ratios=[part / whole],
        ours=part,
        theirs=whole,
        below=1.0,
    )
    return [read, faster, learned]


def epochs_as_long(epochs: int, computed: float, read: float) -> int:
    """As many as take the time of ``epochs``, the first ``computed`` times as fast, the others ``read``."""
    return 1 + round((epochs - 1 / computed) * read)


def held_out_loss(options: argparse.Namespace, epochs: int, targets: str) -> float:
    """After a run, whose best epoch is kept."""
    with tempfile.TemporaryDirectory() as work:
        data, held_out = write_rows(options.data, Path(work), options.rows, HELD_OUT, options.seed)
        settings = {"model": options.model, "data": str(data), "held_out": str(held_out), "samples": 0}
        settings |= {"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "seed": options.seed}
        settings |= {"rows_per_step": 8, "save_every_steps": NO_SAVES}
        out = Path(work) / "run"
        run = fine_tune(Recipe.of(settings | {"epochs": epochs, "targets": targets, "out": out}))
    assert run.comparison
    print(f"{epochs} epochs of {targets[:24]}: {run.comparison.tuned_loss:.4f}", flush=True)
    return run.comparison.tuned_loss


def several(options: argparse.Namespace, side: Trial) -> Figure:
    longer = replace(side, rows=[*side.rows] * ADAPTERS)
    pairs = [
        [tokens_per_second(longer, packed(times)) for times in (ADAPTERS, 1)] for _ in range(options.pairs)
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
