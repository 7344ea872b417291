"""A card: the tests that are marked for it, then speed and memory of training beside PEFT + Trainer and TRL.

    python benchmarks/gpu.py gsm8k_test.jsonl --out gpu.json

Needs no network, and at most ``--minutes``.  The base has random weights in the shapes of Llama: of 8B on a
card of 40 GB and more, of 1B on a smaller one, and tiny ones without a card, where nothing but the script
itself is tried.  All sides train the same rows in bfloat16; Trainer and TRL take ``--rows-at-once`` rows in a
forward, as their users must say by themselves, rankfold what fits.  Writes one JSON file, and on a card
docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from parts.figures import HERE, Figure, machine_line, parser, record
from parts.sides import ROW_LIMIT, ChildError, Job, Result, run_child, tokens_per_second, write_rows

LARGE_GB = 40  # of a card: from here on 8B shapes
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "kv_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32, "kv_heads": 8},
}
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4
SAME = ("tokens", "trained_tokens", "trainable")  # of ours and of PEFT + Trainer
TESTS_SHARE = 0.4  # of the minutes, at most


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file to write")
    made.add_argument("--minutes", type=float, default=8)
    made.add_argument("--rows", type=int, default=16, help="rows a step")
    made.add_argument("--rows-at-once", type=int, default=4, help="of Trainer and TRL, in one forward")
    made.add_argument("--steps", type=int, default=6, help="steps of a run; the first warms up")
    made.add_argument("--no-tests", action="store_true")
    options = made.parse_args()
    begun, card = time.monotonic(), torch.cuda.is_available()
    told: dict[str, Any] = {"machine": machine_line(device()), "date": datetime.now(UTC).date().isoformat()}
    told |= {"card": device(), "shape": shape_for_this_machine(), "rows_at_once": options.rows_at_once}
    if not options.no_tests:
        told["tests"] = marked_tests(60 * TESTS_SHARE * options.minutes)
    with tempfile.TemporaryDirectory() as work:
        told["sides"] = measured(options, Path(work), told["shape"], begun + 60 * options.minutes)
    figures = list(figures_of(told["sides"], told["shape"]))
    told["ratios"] = {figure.name: figure.ratio for figure in figures if not figure.failed}
    options.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if card:
        record(figures, device())
    print(json.dumps(told, indent=2))


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def shape_for_this_machine() -> str:
    if not torch.cuda.is_available():
        return "tiny"
    return "8B" if torch.cuda.get_device_properties(0).total_memory >= LARGE_GB * 1e9 else "1B"


def marked_tests(seconds: float) -> dict[str, Any]:
    """How the tests marked ``gpu`` ended, on whatever device there is."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "said": f"not done after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "said": lines[-1] if lines else "", "failed": failed}


def measured(options: argparse.Namespace, work: Path, shape: str, until: float) -> dict[str, Result]:
    """Tokens a second and the peak memory of each side, or why there is none."""
    data, held_out = write_rows(options.data, work, options.rows * options.steps, 1, options.seed, short=True)
    base = work / "base"
    run_child("random_base", {"base": str(base), "shape": SHAPES[shape], "seed": options.seed}, work)
    job: Job = {"model": str(base), "base": str(base), "data": str(data), "held_out": str(held_out)}
    job |= {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "learning_rate": LEARNING_RATE, "epochs": 1}
    job |= {"schedule": "constant", "rows_per_step": options.rows, "rows_at_once": options.rows_at_once}
    job |= {
        "max_steps": options.steps,
        "max_length": ROW_LIMIT,
        "seed": options.seed,
        "precision": "bfloat16",
    }
    asked = {"steps": options.steps, "lengths": [], "text_tokens": 0}
    job["steps"] = run_child("prepare", job | asked, work)["steps"]
    found: dict[str, Result] = {}
    for name, (script, more) in sides().items():
        in_time = time.monotonic() < until
        found[name] = side(script, job | more, work) if in_time else {"failed": "no time was left"}
    ours, peft = found["ours"], found["peft_trainer"]
    if "failed" not in ours | peft and any(ours[name] != peft[name] for name in SAME):
        found["peft_trainer"] = {"failed": f"it trained other rows or weights than ours: {peft}"}
    return found


def side(script: str, job: Job, work: Path) -> Result:
    try:
        result = run_child(script, job, work)
    except ChildError as failure:
        return {"failed": str(failure)}
    measures = {"tokens_per_second": tokens_per_second(result), "peak_gb": result["training_bytes"] / 1e9}
    return measures | {name: result[name] for name in (*SAME, "losses")}


def sides() -> dict[str, tuple[str, Job]]:
    every: dict[str, tuple[str, Job]] = {
        "ours": ("ours", {}),
        "peft_trainer": ("peers", {}),
        "trl_packed": ("peers", {"trl": "packed"}),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        every["trl_packed_liger"] = ("peers", {"trl": "packed", "liger": True})
    return every


def figures_of(found: dict[str, Result], shape: str) -> list[Figure]:
    """Ours beside each other side, in speed and in memory."""
    figures = []
    for name in found.keys() - {"ours"}:
        ours, theirs = found["ours"], found[name]
        failed = ours.get("failed") or theirs.get("failed") or ""
        for measure, unit in (("tokens_per_second", "tokens/s"), ("peak_gb", "GB")):
            pair = [] if failed else [ours[measure], theirs[measure]]
            figures.append(
                Figure(
                    name=f"gpu_{name}_{measure}",
                    what=f"a card, {shape} shapes in bfloat16, beside {name}",
                    unit=unit,
                    ratios=[pair[0] / pair[1]] if pair else [],
                    ours=pair[0] if pair else None,
                    theirs=pair[1] if pair else None,
                    failed=failed,
                )
            )
    return sorted(figures, key=lambda figure: figure.name)


if __name__ == "__main__":
    main()
