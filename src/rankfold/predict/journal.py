"""Answers on disk as they come, so that a run that was killed loses none."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from rankfold.errors import OutputError, bullet_list
from rankfold.files import lock_for_one
from rankfold.models.answering.answer import Answer

MISSING = -1
KEPT = ("text", "finish_reason", "prompt_tokens", "logprobs", "problem")


class Journal:
    """A line for what is asked and by whom, then one for each answer: the number of its row, its sample, and
    the mark of what was asked.  A last line that a kill has cut off is forgotten.

    Open it with ``opened``."""

    def __init__(self, out: Path, identity: Mapping[str, Any], rows: int, samples: int) -> None:
        self.path = out.with_name(f".{out.name}.answers.jsonl")
        self.identity, self.samples = dict(identity), samples
        self.places = array("q", [MISSING]) * (rows * samples)
        self.answered = 0
        self.file: BinaryIO

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Within the block the journal can be read and written, by nobody else."""
        try:
            self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            lock_for_one(self.file.fileno())
            self._read()
            yield self
        except BlockingIOError as error:
            raise OutputError(f"another process is answering into {self.path}; wait for it") from error
        finally:
            with suppress(OSError):  # of a full disk, which was told
                self.file.close()

    def _read(self) -> None:
        end = 0
        for number, line in enumerate(self.file):
            if not line.endswith(b"\n"):
                break
            try:
                said = json.loads(line)
            except ValueError as error:
                raise OutputError(
                    f"{self.path}:{number + 1} is damaged ({error}); remove the file"
                ) from error
            if number == 0:
                self._refuse_other(said)
            elif (place := said["row"] * self.samples + said["sample"]) < len(self.places):
                self.places[place] = end
                self.answered += 1
            else:
                raise OutputError(f"{self.path} holds more answers than the data has rows; remove it")
            end += len(line)
        self.file.seek(end)
        self.file.truncate()
        if not end:
            self._append(self.identity)

    def _refuse_other(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{name}: {before.get(name)!r} then, {self.identity.get(name)!r} now"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ]
        if changed:
            headline = f"{self.path} holds answers to be gone on with, and they were given otherwise"
            raise OutputError(bullet_list(f"{headline} (remove it, or name another --out):", changed))

    def has(self, row: int, sample: int, mark: str) -> bool:
        """Whether there is an answer.  Raises OutputError if it is one to something else."""
        if self.places[row * self.samples + sample] == MISSING:
            return False
        if self._said(row, sample)["asked"] != mark:
            raise OutputError(
                f"row {row + 1} of the data is not what it was when it was answered; remove {self.path}, or "
                "name another --out"
            )
        return True

    def add(self, row: int, sample: int, mark: str, answer: Answer) -> None:
        said = {name: getattr(answer, name) for name in KEPT}
        place = self._append(
            {"row": row, "sample": sample, "asked": mark, "tokens": len(answer.tokens), **said}
        )
        self.places[row * self.samples + sample] = place
        self.answered += 1

    def answer(self, row: int, sample: int) -> dict[str, Any]:
        return self._said(row, sample)

    def _said(self, row: int, sample: int) -> dict[str, Any]:
        self.file.seek(self.places[row * self.samples + sample])
        found: dict[str, Any] = json.loads(self.file.readline())
        return found

    def _append(self, value: Mapping[str, Any]) -> int:
        try:
            place = self.file.seek(0, os.SEEK_END)
            self.file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; what was answered before is in it, and the "
                "same command goes on"
            ) from error
        return place

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
