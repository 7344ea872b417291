"""The folder of a run: its recipe, its record, its metrics, its checkpoints, and who works in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rankfold.errors import CheckpointError, OutputError
from rankfold.files import lock_for_one, staged_folder, write_whole
from rankfold.train.keeping.names import LOCK_NAME, METRICS_NAME, RECIPE_NAME, RECORD_NAME
from rankfold.train.step.loop import StepRecord


class RunFolder:
    """``path`` and what is in it.  Make one with ``create``, or open one that is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.recipe_path = path / RECIPE_NAME

    @classmethod
    def create(cls, path: Path, recipe: dict[str, Any], record: dict[str, Any]) -> RunFolder:
        """The folder appears with its recipe and record in it, or not at all."""
        with staged_folder(path) as staging:
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            (staging / RECIPE_NAME).write_text(text, encoding="utf-8")
            (staging / RECORD_NAME).write_text(_json(record), encoding="utf-8")
            (staging / METRICS_NAME).touch()
            (staging / "checkpoints").mkdir()
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; raises OutputError naming the process that holds it."""
        descriptor = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock_for_one(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode().strip()
            os.close(descriptor)
            raise OutputError(
                f"process {holder} is training in {self.path}; wait for it or stop it"
            ) from error
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(descriptor)

    def record(self) -> dict[str, Any]:
        """``run.json``; raises CheckpointError if the folder holds no run."""
        try:
            value = json.loads((self.path / RECORD_NAME).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{self.path} holds no run: {RECORD_NAME}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / RECORD_NAME} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / RECORD_NAME} is not the record of a run")
        return value

    def write_record(self, record: dict[str, Any]) -> None:
        write_whole(self.path / RECORD_NAME, _json(record))

    def add_metrics(self, record: StepRecord) -> None:
        """One line a step.  Not forced to disk: after a crash the lines are cut back to a checkpoint."""
        with (self.path / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def metrics(self) -> list[StepRecord]:
        """Of every step, in order; of one that was done twice, the last time."""
        records: dict[int, StepRecord] = {}
        for line in (self.path / METRICS_NAME).read_text(encoding="utf-8").splitlines():
            try:
                record = StepRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that a kill cut short
            records[record.step] = record
        return [record for _, record in sorted(records.items())]

    def cut_metrics(self, step: int) -> None:
        """Keep the metrics of the first ``step`` steps only."""
        kept = [json.dumps(asdict(record)) + "\n" for record in self.metrics() if record.step <= step]
        write_whole(self.path / METRICS_NAME, "".join(kept))


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
