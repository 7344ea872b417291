"""What is in the folder of a run, and which folder may become one."""

from __future__ import annotations

from pathlib import Path

from rankfold.errors import OutputError

RECIPE_NAME = "recipe.yaml"
RECORD_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
REPORT_NAME = "report.html"
LOCK_NAME = ".lock"


def refuse_used_folder(out: Path) -> None:
    """Raise OutputError if ``out`` is anything but a new or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        if (out / RECORD_NAME).is_file():
            raise OutputError(
                f"the output folder {out} holds a run already; go on with it by `rankfold resume {out}`, "
                "or name another --out"
            )
        raise OutputError(
            f"the output folder {out} exists and is not an empty folder; "
            "name another --out, or remove it first"
        )
