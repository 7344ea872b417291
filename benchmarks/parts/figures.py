"""What a measurement leaves: ``results.json`` and, from it, ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parts.bounds import told

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 and bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
PACKAGES = ("rankfold", "torch", "transformers", "peft", "trl")

HEAD = """# Benchmarks

Written by `make bench` and the scripts in `benchmarks/`; not edited by hand. {model_line}

Each side runs in a process of its own, one after the other in turn; a figure is the median over the rounds,
with the lowest and the highest. Tokens are those of the rows, without padding. Seconds are counted from the
end of the first step, which warms up, to the end of the last, with everything in between. Peak memory is that
of the process since the end of the first step. Both sides train the same rows in the same steps, with the
masks that rankfold made, from the same base; on a CPU both in float32, unless a row says otherwise.

| figure | what is compared | ours | theirs | ratio | lowest to highest | wanted | |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured comparison.  ``ratios``, one a round, are of ``ours`` to ``theirs`` (medians, in
    ``unit``); the goal is ``at_least``, ``at_most`` or ``below``.  ``failed`` says why there is none."""

    name: str
    what: str
    unit: str
    ratios: Sequence[float] = ()
    ours: float | None = None
    theirs: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    failed: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:.3g}"
        if self.below is not None:
            return f"below {self.below:.3g}"
        return f"at most {self.at_most:.3g}" if self.at_most is not None else ""

    @property
    def reached(self) -> bool | None:
        if self.ratio is None or not self.wanted:
            return None
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio < self.below if self.below is not None else self.ratio <= (self.at_most or 0)

    def as_json(self, command: str, machine: str) -> dict[str, Any]:
        numbers = {"low": min(self.ratios), "high": max(self.ratios)} if self.ratios else {}
        values = asdict(self) | {"ratio": self.ratio, "wanted": self.wanted, "reached": self.reached}
        order = ("name", "ratio", "low", "high", "unit", "ours", "theirs", "wanted", "reached", "what")
        found = {"low": None, "high": None} | values | numbers
        known = {key: found[key] for key in order} | {"rounds": len(self.ratios)}
        known |= {"command": command, "machine": machine, "date": datetime.now(UTC).date().isoformat()}
        return known | ({"failed": self.failed} if self.failed else {}) | self.more


def record(figures: Sequence[Figure], device: str = "") -> None:
    """Put ``figures`` in the place of those of the same name in results.json, and write the page anew."""
    command, machine = command_line(), machine_line(device)
    new = {figure.name: figure.as_json(command, machine) for figure in figures}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = {entry["name"]: entry for entry in old} | new
    RESULTS.write_text(json.dumps(list(kept.values()), indent=2) + "\n")
    PAGE.write_text(page(list(kept.values())), encoding="utf-8")
    for figure in figures:
        print(line(new[figure.name]), flush=True)


def line(entry: dict[str, Any]) -> str:
    """A figure for the terminal."""
    if entry.get("failed"):
        return f"{entry['name']:32} FAILED: {entry['failed']}"
    spread = f"{entry['ratio']:.3g} ({entry['low']:.3g} to {entry['high']:.3g})"
    goal = (
        f"  {entry['wanted']}: {'reached' if entry['reached'] else 'NOT REACHED'}" if entry["wanted"] else ""
    )
    return f"{entry['name']:32} {spread:28} {entry['unit']}{goal}"


def page(entries: list[dict[str, Any]]) -> str:
    model_line = "SmolLM2-135M-Instruct and rows of GSM8K's test set, unless a row says otherwise."
    rows = "".join(_row(entry) for entry in entries)
    tail = ["\nThe unit of ours and theirs stands in the second column. Machines and commands:\n"]
    for ran in dict.fromkeys((entry["machine"], entry["command"], entry["date"]) for entry in entries):
        names = [f"`{e['name']}`" for e in entries if (e["machine"], e["command"], e["date"]) == ran]
        tail.append(f"- `{ran[1]}` on {ran[0]}, {ran[2]}: {', '.join(names)}")
    bounds = ["\n## What bounds the figures that are not reached\n", *told(entries)]
    return HEAD.format(model_line=model_line) + rows + "\n".join(tail + bounds) + "\n"


def _row(entry: dict[str, Any]) -> str:
    what = f"{entry['what']} ({entry['unit']})"
    if entry.get("failed"):
        why = entry["failed"].replace("|", "/")
        return f"| `{entry['name']}` | {what} | | | **failed** | {why} | {entry['wanted']} | |\n"
    ours, theirs = (f"{v:,.4g}" if v is not None else "" for v in (entry["ours"], entry["theirs"]))
    reached = {True: "reached", False: "not reached", None: ""}[entry["reached"]]
    return (
        f"| `{entry['name']}` | {what} | {ours} | {theirs} | {entry['ratio']:.3g} "
        f"| {entry['low']:.3g} to {entry['high']:.3g} | {entry['wanted']} | {reached} |\n"
    )


def command_line() -> str:
    """What was called, with file names for paths."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def machine_line(device: str = "") -> str:
    """Processor with its widest units, cores, memory and versions; no host name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    processor = (names or [platform.processor() or platform.machine()])[0]
    can = next((x.split() for x in lines if x.startswith("flags")), [])
    processor += next((f" with {told}" for unit, told in UNITS.items() if unit in can), "")
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    hardware = [processor, f"{os.cpu_count()} cores", f"{gigabytes:.0f} GB", *([device] if device else [])]
    return f"{', '.join(hardware)}; Python {platform.python_version()}, {versions}"


def parser(about: str) -> argparse.ArgumentParser:
    """The arguments that every script takes."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path, help="rows of question and answer, as gsm8k_test.jsonl has them")
    made.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    made.add_argument("--seed", type=int, default=0)
    return made
