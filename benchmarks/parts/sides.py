"""What the measuring scripts share: the rows, the child processes, and the meter that both sides carry.

Each side of a comparison runs in a process of its own, takes a job (JSON) and writes a result (JSON).  The
parent imports no torch, so that nothing of it counts in a child's memory or time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
ROW_LIMIT = 512  # tokens; the length that padding="max_length" pads to, and no row of speed.py is longer
ROW_CHARACTERS = 5 * ROW_LIMIT // 2  # of a line: none of these was longer than ROW_LIMIT tokens
NO_SAVES = 1_000_000  # steps between checkpoints: neither side of a speed comparison writes any
WARMUP_SHARE = 0.05

Job = dict[str, Any]
Result = dict[str, Any]


class ChildError(Exception):
    """A measuring process ended badly; says which, and the last line of what it wrote."""


def run_child(script: str, job: Job, folder: Path) -> Result:
    """Run ``benchmarks/children/SCRIPT.py`` on ``job`` in a process of its own, which works in a new folder
    below ``folder``, and give its result.  Raises ChildError."""
    place = folder / f"{len(list(folder.glob('child-*'))):03d}"
    place = place.with_name(f"child-{place.name}")
    place.mkdir(parents=True)
    job = job | {"folder": str(place)}
    (place / "job.json").write_text(json.dumps(job))
    with (place / "log.txt").open("w") as log:
        command = [sys.executable, "-m", f"children.{script}", str(place)]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=found, stdout=log, stderr=subprocess.STDOUT, check=False)
    status = done.returncode
    if status:
        lines = (place / "log.txt").read_text().strip().splitlines() or ["it said nothing"]
        raise ChildError(f"{script} ended with status {status}: {lines[-1].strip()}")
    result: Result = json.loads((place / "result.json").read_text())
    return result


def be_child(work: Callable[[Job], Result]) -> None:
    """The whole ``main`` of a script that ``run_child`` runs."""
    place = Path(sys.argv[1])
    result = work(json.loads((place / "job.json").read_text()))
    (place / "result.json").write_text(json.dumps(result))


def write_rows(
    data: Path, folder: Path, train: int, held_out: int, seed: int, *, short: bool = False
) -> tuple[Path, Path]:
    """Shuffle the lines of ``data``, if ``short`` those without more than ROW_CHARACTERS, and write the first
    ``held_out`` and the next ``train`` of them to two files: (training rows, held-out rows)."""
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [line for line in lines if len(line) <= ROW_CHARACTERS or not short]
    if train + held_out > len(lines):
        raise SystemExit(f"{data.name} has {len(lines)} rows, {train + held_out} are wanted")
    random.Random(seed).shuffle(lines)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (lines[held_out : held_out + train], lines[:held_out]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def rate_factor(step: int, steps: int, schedule: str) -> float:
    """The share of the peak learning rate at ``step`` (1-based), as in a rankfold run: constant, or half a
    cosine, after a linear warm-up over a twentieth of the steps."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step <= warmup:
        return step / warmup
    left = (steps - step + 1) / (steps - warmup + 1)
    return 0.5 * (1 - math.cos(math.pi * left)) if schedule == "cosine" else 1.0


class Meter:
    """Loss, tokens and end of each step, and the peak memory after the first step, which warms up."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.trained_tokens: list[int] = []
        self.ends: list[float] = []
        self.training_bytes = 0

    def step(self, loss: float, tokens: int, trained_tokens: int) -> None:
        """An optimiser step has ended.  ``tokens`` are those of the rows, without padding."""
        _synchronise()
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.trained_tokens.append(trained_tokens)
        self.ends.append(time.perf_counter())
        self.training_bytes = peak_bytes()  # here, as a run may go on to judge what it trained
        if len(self.ends) == 1:
            _forget_peak()

    def result(self, **more: Any) -> Result:
        return {
            "losses": self.losses,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "ends": self.ends,
            "training_bytes": self.training_bytes,
            **more,
        }


def tokens_per_second(result: Result) -> float:
    """Of all steps but the first, from the end of the first to the end of the last."""
    return float(sum(result["tokens"][1:]) / (result["ends"][-1] - result["ends"][0]))


def seconds_per_step(result: Result) -> float:
    """As above; not a number after one step only."""
    ends = result["ends"]
    return float((ends[-1] - ends[0]) / (len(ends) - 1)) if len(ends) > 1 else math.nan


def on_both() -> str:
    """The number format that both sides compute in where nothing else is said."""
    import torch

    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Let the peak count from now on: of the GPU where there is one, else of the process (Linux)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # then the peak of the whole process counts, loading included
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Since ``_forget_peak``: what ru_maxrss says of the whole life of a process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
