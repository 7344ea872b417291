"""What a run costs besides its steps: the way to the first one, and the checkpoints.

    python benchmarks/overhead.py gsm8k_test.jsonl

Start: from calling ``rankfold train --data ROWS --out RUN``, all settings at their defaults, to the beginning
of the first step: when its line stands in ``metrics.jsonl``, less the seconds that the step took.  Cold: with
an empty cache folder, so that the GGUF file is expanded and the rows are encoded first; warm: the same again.
The GGUF file is in the system's page cache either way.

Checkpoints: a default run that ends after ``--minutes`` of training.  What lies between the end of a step and
the beginning of the next (the time since the last one less its own seconds) is all that is not training:
checkpoints, the metrics file, the next rows.  The share of the gaps in which a checkpoint appeared is the
cost of saving; the share of all of them is reported too, as an upper bound."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parts.figures import Figure, parser, record
from parts.sides import ChildError, run_child

PATIENCE_S = 600
LOOK_S = 0.01
CALL = "from rankfold.cli.main import main; main()"


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--starts", type=int, default=3, help="warm starts; there is one cold one")
    made.add_argument("--minutes", type=float, default=3, help="of training, to see checkpoints written")
    made.add_argument("--work", help="folder for temporary files [the system's]")
    options = made.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        os.environ["RANKFOLD_CACHE"] = str(Path(work) / "cache")
        figures = [*starts(options, Path(work)), *saves(options, Path(work))]
    record(figures)


def starts(options: argparse.Namespace, work: Path) -> list[Figure]:
    """The cold start is the first, as the cache folder is empty then."""
    cold = _start_figure("start_cold", "from the command to the first step, empty cache", None)
    warm = _start_figure("start_warm", "from the command to the first step", 20.0)
    step = _start_figure("first_step", "the first step itself", None)
    try:
        both = [first_step(options, work / f"run{number}") for number in range(1 + options.starts)]
    except ChildError as failure:
        return [Figure(**figure, failed=str(failure)) for figure in (cold, warm, step)]
    (first, *starts), steps = ([pair[place] for pair in both] for place in range(2))
    return [
        Figure(**cold, ratios=[first], ours=first),
        Figure(**warm, ratios=starts, ours=statistics.median(starts)),
        Figure(**step, ratios=steps, ours=statistics.median(steps)),
    ]


def _start_figure(name: str, what: str, at_most: float | None) -> dict[str, object]:
    return {"name": name, "what": what, "unit": "s", "at_most": at_most}


def first_step(options: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Seconds until the first step, and of it; then the run is ended.  Raises ChildError."""
    command = [sys.executable, "-c", CALL, "train", "--model", options.model]
    command += ["--data", str(options.data), "--out", str(out)]
    metrics, log = out / "metrics.jsonl", out.with_suffix(".log")
    with log.open("w") as said:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            while not (metrics.exists() and metrics.read_bytes().endswith(b"\n")):
                if child.poll() is not None or time.perf_counter() - began > PATIENCE_S:
                    lines = log.read_text().strip().splitlines() or ["nothing"]
                    raise ChildError(f"rankfold train made no step; it said last: {lines[-1]}")
                time.sleep(LOOK_S)
            seconds = time.perf_counter() - began
        finally:
            child.kill()
            child.wait()
    step = json.loads(metrics.read_text().splitlines()[0])["seconds"]
    print(f"the first step began after {seconds - step:.1f} s and took {step:.1f} s", flush=True)
    return seconds - step, step


def saves(options: argparse.Namespace, work: Path) -> list[Figure]:
    job = {"model": options.model, "data": str(options.data.resolve()), "max_minutes": options.minutes}
    known = {"what": "writing checkpoints, of a default run's time", "unit": "% of training time"}
    goal = {**known, "name": "checkpoints", "at_most": 2.0}
    bound = {"name": "between_steps", "what": "all that is not a step, of the same", "unit": known["unit"]}
    try:
        result = run_child("gaps", job, work)
    except ChildError as failure:
        return [Figure(**figure, failed=str(failure)) for figure in (goal, bound)]
    whole = result["ends"][-1] - result["ends"][0]
    spent = [100 * gap / whole for gap in result["gaps"]]
    saved = [100 * result["gaps"][place] / whole for place in result["saved"]]
    told = {"steps": len(result["ends"]), "checkpoints": len(saved), "seconds": whole}
    print(f"{len(saved)} checkpoints in {whole:.0f} s and {len(result['ends'])} steps", flush=True)
    if not saved:
        return [Figure(**goal, failed="no checkpoint was written in that time; raise --minutes")]
    return [
        Figure(**goal, ratios=[sum(saved)], ours=sum(saved), more=told),
        Figure(**bound, ratios=[sum(spent)], ours=sum(spent)),
    ]


if __name__ == "__main__":
    main()
