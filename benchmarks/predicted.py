"""What is said of a run's memory and time before its first step, beside what it took, at six settings.

    python benchmarks/predicted.py gsm8k_test.jsonl

Each setting is forecast from the config alone (``rankfold plan``), and carried out in a process of its own.
Said before the run are the peak of the pre-flight and the minutes of the plan; used are the process's peak
over its whole life and the seconds from the first step to the report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from parts.figures import HERE, Figure, parser, record
from parts.sides import Result, run_child, write_rows

JOKES = HERE.parent / "src" / "rankfold" / "data" / "cold_jokes" / "train.jsonl"
ROWS, JOINED, STEPS = 120, 8, 6
GB = 1e9


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sums, _ = write_rows(options.data, folder, ROWS, 1, options.seed)
        common = {"model": options.model, "max_steps": STEPS, "samples": 0, "seed": options.seed}
        found = []
        for name, own in settings(sums, joined(sums, folder)).items():
            recipe = common | own
            said = run_child("planned", {"only": "forecast", "recipe": recipe}, folder)
            ran = run_child("planned", {"only": "run", "recipe": recipe}, folder)
            print(f"{name}: {said} from the config; {ran}", flush=True)
            found += figures(name, said, ran)
    record(found)


def settings(sums: Path, long: Path) -> dict[str, dict[str, Any]]:
    plain = {"data": str(sums), "precision": "float32"}
    return {
        "jokes in float32": plain | {"data": str(JOKES)},
        "jokes in bfloat16": {"data": str(JOKES), "precision": "bfloat16"},
        "sums at rank 64": plain | {"rank": 64},
        "sums, activations recomputed": plain | {"activation_checkpointing": True},
        "sums, weights held in q4_0": plain | {"stored": "q4_0"},
        "rows of 2,000 tokens": plain | {"data": str(long), "max_steps": 3},
    }


def joined(sums: Path, folder: Path) -> Path:
    """Rows of ``JOINED`` sums each."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    words = [f"{row['question']}\n{row['answer']}" for row in rows]
    texts = ["\n\n".join(words[at : at + JOINED]) for at in range(0, len(words), JOINED)]
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def figures(name: str, said: Result, ran: Result) -> list[Figure]:
    """Used to what was said, by the plan and by the config alone."""
    key = name.replace(",", "").replace(" ", "_")
    said_before = {
        ("forecast_memory", "that from the config"): (ran["bytes"] / GB, said["bytes"] / GB, "GB"),
        ("preflight_memory", "that from the pre-flight"): (ran["bytes"] / GB, ran["said_bytes"] / GB, "GB"),
        ("forecast_time", "that from the config"): (ran["seconds"], said["seconds"], "s"),
        ("plan_time", "that timed before it"): (ran["seconds"], ran["said_seconds"], "s"),
    }
    return [
        Figure(
            name=f"{kind}_{key}",
            what=f"{name}: the run's {'peak' if unit == 'GB' else 'time'} to {how}",
            unit=unit,
            ratios=[used / told],
            ours=used,
            theirs=told,
        )
        for (kind, how), (used, told, unit) in said_before.items()
    ]


if __name__ == "__main__":
    main()
