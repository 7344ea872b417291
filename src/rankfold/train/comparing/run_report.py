"""``RunsReport``: several finished runs in numbers, whose JSON has a published schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from rankfold.judging.intervals import interval, resampled, sign_test
from rankfold.judging.names import short_names
from rankfold.train.asked.recipe_file import read_recipe
from rankfold.train.keeping.folder import RunFolder
from rankfold.train.step.loop import StepRecord

SCHEMA_VERSION = 1
NOT_COMPARED = ("out",)  # settings that every run has of its own
CURVE_POINTS = 500


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Part):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class HeldOutPart(_Part):
    """Loss on the rows held out, in nats per trained token."""

    rows: int
    trained_tokens: int
    base_loss: float
    tuned_loss: float
    gap: Number = Field(description="tuned minus base; below 0 is better")


class Sampled(_Part):
    prompt: str
    written: str
    base: str
    tuned: str


class Point(_Part):
    """One step."""

    step: int
    loss: float
    held_out_loss: float | None = None


class RunPart(_Part):
    """One run."""

    name: str
    status: str
    base: str
    train_rows: int
    steps: int
    tokens: int = Field(description="that passed the model in training, padding left out")
    seconds: float = Field(description="of the steps alone")
    peak_memory_bytes: int
    energy_joules: float | None = Field(description="of the processor during the steps; null if unreadable")
    settings: dict[str, Any]
    held_out: HeldOutPart | None
    forgetting: Number | None = Field(description="rise of the loss on general text, nats a token")
    remarks: list[str]
    samples: list[Sampled]
    curve: list[Point] = Field(description=f"at most {CURVE_POINTS} steps, spread over the run")


class Pair(_Part):
    """A run beside the first, on the same rows held out."""

    first: str
    second: str
    gap: Number = Field(description="loss of the second minus that of the first, nats a token")
    chance: float = Field(description="sign test: how likely so uneven changes of rows are by chance")
    verdict: Literal["better", "worse", "not told apart"]


class RunsReport(_Part):
    """What ``rankfold report`` writes as report.json."""

    schema_version: int = SCHEMA_VERSION
    runs: list[RunPart]
    differing: dict[str, list[Any]] = Field(description="settings that are not the same: each run's value")
    pairs: list[Pair]
    notes: list[str]


def report_on(folders: Sequence[Path]) -> RunsReport:
    """The runs in ``folders``.  Raises CheckpointError for a folder that holds none, ConfigError
    for one that is named twice."""
    records = [RunFolder(folder).record() for folder in folders]
    names = short_names(folders)
    runs = [_run(*each) for each in zip(names, folders, records, strict=True)]
    pairs, notes = _pairs(names, records)
    return RunsReport(runs=runs, differing=_differing(runs), pairs=pairs, notes=notes)


def _run(name: str, folder: Path, record: dict[str, Any]) -> RunPart:
    run = RunFolder(folder)
    steps = run.metrics()
    learnt, comparison = record.get("learnt") or {}, record.get("comparison")
    forgetting = (learnt.get("forgetting") or {}).get("whole")
    joules = [step.energy_joules for step in steps]
    remarks = [f"nothing changed: {learnt['nothing']}"] if learnt.get("nothing") else []
    return RunPart(
        name=name,
        status=record.get("status", "unknown"),
        base=record.get("base", ""),
        train_rows=record.get("rows", {}).get("train", 0),
        steps=len(steps),
        tokens=sum(step.tokens for step in steps),
        seconds=sum(step.seconds for step in steps),
        peak_memory_bytes=max((step.memory_bytes for step in steps), default=0),
        energy_joules=None if None in joules or not joules else sum(j for j in joules if j is not None),
        settings={k: v for k, v in read_recipe(run.recipe_path).items() if k not in NOT_COMPARED},
        held_out=_held_out(comparison) if comparison else None,
        forgetting=Number(**forgetting["rise"]) if forgetting else None,
        remarks=remarks,
        samples=[Sampled(**sample) for sample in record.get("samples", [])],
        curve=_curve(steps),
    )


def _held_out(comparison: dict[str, Any]) -> HeldOutPart:
    gap = Number(value=comparison["gap"], low=comparison["gap_low"], high=comparison["gap_high"])
    names = ("rows", "trained_tokens", "base_loss", "tuned_loss")
    return HeldOutPart(gap=gap, **{name: comparison[name] for name in names})


def _curve(steps: Sequence[StepRecord]) -> list[Point]:
    """Steps spread over the run, and all with a look at the rows held out."""
    every = max(1, -(-len(steps) // CURVE_POINTS))
    return [
        Point(step=step.step, loss=step.loss, held_out_loss=step.held_out_loss)
        for place, step in enumerate(steps)
        if place % every == 0 or step.held_out_loss is not None or place == len(steps) - 1
    ]


def _differing(runs: Sequence[RunPart]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(each != found[0] for each in found)}


def _pairs(names: Sequence[str], records: Sequence[dict[str, Any]]) -> tuple[list[Pair], list[str]]:
    """Every run beside the first, where both were judged on the same rows; what is told of the others."""
    pairs, notes = [], []
    first = records[0].get("comparison") or {}
    for name, record in zip(names[1:], records[1:], strict=True):
        second = record.get("comparison") or {}
        without = [each for each, of in ((names[0], first), (name, second)) if not of.get("tuned_rows")]
        if without:
            told = f"{' and '.join(without)} has no losses of the rows held out"
            notes.append(f"{name} is not tested beside {names[0]}: {told}")
        elif _held_out_of(records[0]) != _held_out_of(record):
            notes.append(f"{name} is not tested beside {names[0]}: they were judged on other rows")
        else:
            pairs.append(_pair(names[0], name, first, second))
    return pairs, notes


def _held_out_of(record: dict[str, Any]) -> Any:
    return record.get("identity", {}).get("held_out_rows")


def _pair(first: str, second: str, before: dict[str, Any], after: dict[str, Any]) -> Pair:
    gaps = torch.tensor(after["tuned_rows"], dtype=torch.float64) - torch.tensor(
        before["tuned_rows"], dtype=torch.float64
    )
    counts = torch.tensor(before["row_weights"], dtype=torch.float64)
    sums = resampled(torch.stack([gaps, counts], dim=1), seed=0)
    found = interval(float(gaps.sum() / counts.sum()), sums[:, 0] / sums[:, 1])
    verdict: Literal["better", "worse", "not told apart"] = "not told apart"
    if not found.holds_zero:
        verdict = "better" if found.value < 0 else "worse"
    gap = Number(value=found.value, low=found.low, high=found.high)
    return Pair(first=first, second=second, gap=gap, chance=sign_test(gaps), verdict=verdict)
