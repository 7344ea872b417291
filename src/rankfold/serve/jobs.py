"""Fine-tuning jobs: each an ordinary run in a folder and a process of its own, one after another."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import re
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankfold.files import write_whole
from rankfold.serve.job_request import JobRequest
from rankfold.serve.refusing import RefusedError
from rankfold.serve.uploads import Uploads
from rankfold.train.keeping.folder import RunFolder
from rankfold.train.step.loop import StepRecord

JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
JOB, EVENTS, RUN, LOG = "job.json", "events.jsonl", "run", "log.txt"
ACTIVE = ("validating_files", "queued", "running")
AGAIN_S = 5  # after a job could not be begun
STOPPING_S = 120  # for a run to save what it has
RESULTS = ("step", "train_loss", "valid_loss", "learning_rate", "trained_tokens")
MOST_TOLD = 8000  # characters of what a run said that failed

LOGGER = logging.getLogger("rankfold.serve")
Ready = Callable[[str, Path], Awaitable[None]]


class Jobs:
    """The jobs in ``root``.  ``recipe`` makes the settings of a run; ``ready`` is called with the name and
    the folder of each model that is done, those of earlier servers too."""

    def __init__(
        self, root: Path, uploads: Uploads, recipe: Callable[[JobRequest, Path], dict[str, Any]], ready: Ready
    ) -> None:
        self.root, self.uploads, self.recipe, self.ready = root, uploads, recipe, ready
        root.mkdir(parents=True, exist_ok=True)
        self._work = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._running = ""

    # What clients ask

    def all(self) -> list[dict[str, Any]]:
        """The newest first."""
        found = [self.facts(each.name) for each in self.root.iterdir() if JOB_ID.fullmatch(each.name)]
        return sorted(found, key=lambda job: (-job["created_at"], -job["number"], job["id"]))

    def facts(self, number: str) -> dict[str, Any]:
        """Raises RefusedError for a job that is not there."""
        if not JOB_ID.fullmatch(number):
            raise RefusedError(404, f"there is no job {number!r:.100}", param="id")
        try:
            found: dict[str, Any] = json.loads((self.root / number / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RefusedError(404, f"there is no job {number!r:.100}", param="id") from error
        return found

    def add(self, asked: JobRequest) -> dict[str, Any]:
        """Queue a job.  Raises RefusedError for files that are not there and settings that cannot be."""
        number, folder = f"ftjob-{secrets.token_hex(12)}", Path()
        folder = self.root / number
        settings = self.recipe(asked, folder / RUN)
        folder.mkdir()
        write_whole(folder / "recipe.json", json.dumps(settings, default=str))
        job = {
            "id": number,
            "object": "fine_tuning.job",
            "number": time.time_ns(),
            "created_at": int(time.time()),
            "model": asked.model,
            "training_file": asked.training_file,
            "validation_file": asked.validation_file,
            "hyperparameters": asked.hyperparameters_told(),
            "method": asked.method_told(),
            "seed": asked.seed or 0,
            "suffix": asked.suffix,
            "metadata": asked.metadata,
            "organization_id": "rankfold",
            "result_files": [],
            "status": "queued",
            "fine_tuned_model": None,
            "finished_at": None,
            "trained_tokens": None,
            "estimated_finish": None,
            "error": None,
            "integrations": [],
        }
        write_whole(folder / JOB, json.dumps(job))
        self._tell(number, "the job waits for its turn" if self._running else "the job begins")
        self._work.set()
        return job

    def cancel(self, number: str, into: str = "cancelled") -> dict[str, Any]:
        """End a job, or let it rest (``into`` "paused"): what it has learnt stays in its folder."""
        job = self.facts(number)
        if job["status"] not in (*ACTIVE, "paused") or job["status"] == into:
            raise RefusedError(409, f"the job is {job['status']} already")
        ended = int(time.time()) if into == "cancelled" else None
        job = self._change(number, status=into, finished_at=ended)
        self._tell(number, f"the job is {into}")
        if number == self._running and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        return job

    def go_on(self, number: str) -> dict[str, Any]:
        """Queue a job that was paused."""
        if (status := self.facts(number)["status"]) != "paused":
            raise RefusedError(409, f"the job is {status}, not paused")
        job = self._change(number, status="queued")
        self._tell(number, "the job goes on")
        self._work.set()
        return job

    def events(self, number: str) -> list[dict[str, Any]]:
        """What happened, the newest first: what was told, and the numbers of each step."""
        job = self.facts(number)
        told = [json.loads(line) for line in self._lines(number)]
        steps = self.steps(number)
        begun = job["created_at"]
        seconds = 0.0
        for record in steps:
            seconds += record.seconds
            told.append(
                _event(f"ftevent-{number[6:]}-{record.step}", int(begun + seconds), *_of_step(record))
            )
        return sorted(told, key=lambda event: event["created_at"], reverse=True)

    def checkpoints(self, number: str) -> list[dict[str, Any]]:
        """Looks at the held-out rows, the newest first; the best of them is what the job's model is."""
        job = self.facts(number)
        looks = [record for record in self.steps(number) if record.held_out_loss is not None]
        return [
            {
                "id": f"ftckpt-{number[6:]}-{record.step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": job["created_at"],
                "fine_tuned_model_checkpoint": job["fine_tuned_model"] or "",
                "fine_tuning_job_id": number,
                "step_number": record.step,
                "metrics": _metrics(record),
            }
            for record in reversed(looks)
        ]

    def _lines(self, number: str) -> list[str]:
        """What was told; a line that is being written is left for the next time."""
        path = self.root / number / EVENTS
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []

    def steps(self, number: str) -> list[StepRecord]:
        try:
            return RunFolder(self.root / number / RUN).metrics()
        except (OSError, ValueError):
            return []

    # What the server does

    async def run(self) -> None:
        """Do one job after another until cancelled; then the running one saves what it has, and is gone on
        with by the next server."""
        for job in reversed(self.all()):
            if job["status"] == "succeeded":
                await self._offer(job)
            elif job["status"] in ACTIVE:
                self._change(job["id"], status="queued")
        while True:
            self._work.clear()
            waiting = [job["id"] for job in reversed(self.all()) if job["status"] == "queued"]
            if not waiting:
                await self._work.wait()
                continue
            try:
                await self._do(waiting[0])
            except OSError as error:  # no room on the disk, say
                LOGGER.exception("job %s", waiting[0])
                with suppress(OSError):
                    self._change(
                        waiting[0],
                        status="failed",
                        error={"code": "failed", "message": str(error), "param": None},
                    )
                await asyncio.sleep(AGAIN_S)

    async def _do(self, number: str) -> None:
        folder = self.root / number
        self._running = number
        self._change(number, status="running")
        status = None
        try:
            with (folder / LOG).open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *_command(folder),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                status = await self._process.wait()
        except asyncio.CancelledError:
            await self._stop()
            raise
        finally:
            self._process, self._running = None, ""
        if self.facts(number)["status"] == "running":
            await self._ended(number, status)

    async def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOPPING_S):
                await process.wait()
        except TimeoutError:
            process.kill()

    async def _ended(self, number: str, status: int | None) -> None:
        job, now = self.facts(number), int(time.time())
        if status != 0:
            said = (self.root / number / LOG).read_text(encoding="utf-8", errors="replace")[-MOST_TOLD:]
            problem = (
                said[said.rfind("error: ") :].removeprefix("error: ").strip() if "error: " in said else said
            )
            of_rows = "rows" in problem or "row " in problem
            error: dict[str, Any] = {
                "code": "invalid_training_file" if of_rows else "run_failed",
                "message": problem or f"the run ended with status {status}",
                "param": "training_file" if of_rows else None,
            }
            self._change(number, status="failed", finished_at=now, error=error)
            self._tell(number, error["message"], "error")
            return
        steps = self.steps(number)
        name = ":".join(["ft", job["model"], "rankfold", job["suffix"] or "", number[-8:]])
        results = self.uploads.add(io.BytesIO(_results(steps)), f"{number}.csv", "fine-tune-results")
        job = self._change(
            number,
            fine_tuned_model=name,
            trained_tokens=sum(record.trained_tokens for record in steps),
            result_files=[results["id"]],
        )
        await self._offer(job)
        self._change(number, status="succeeded", finished_at=now)
        self._tell(number, f"the job is done: {name}")

    async def _offer(self, job: dict[str, Any]) -> None:
        try:
            await self.ready(job["fine_tuned_model"], self.root / job["id"] / RUN)
        except RefusedError as error:
            self._tell(job["id"], f"the model cannot be served: {error.detail}", "warn")

    def _change(self, number: str, **changes: Any) -> dict[str, Any]:
        job = self.facts(number) | changes
        write_whole(self.root / number / JOB, json.dumps(job))
        return job

    def _tell(self, number: str, message: str, level: str = "info") -> None:
        event = _event(f"ftevent-{secrets.token_hex(8)}", int(time.time()), message, None, level)
        with (self.root / number / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _command(folder: Path) -> list[str]:
    """Begins the run in ``folder``, or goes on with it."""
    rankfold = [sys.executable, "-m", "rankfold"]
    if (folder / RUN / "run.json").is_file():
        return [*rankfold, "resume", str(folder / RUN)]
    settings = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return [*rankfold, "train", *(f"{name}={value}" for name, value in settings.items())]


def _event(number: str, created: int, message: str, data: Any = None, level: str = "info") -> dict[str, Any]:
    return {
        "id": number,
        "object": "fine_tuning.job.event",
        "created_at": created,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data or {},
    }


def _of_step(record: StepRecord) -> tuple[str, dict[str, Any]]:
    held_out = "" if record.held_out_loss is None else f", validation loss={record.held_out_loss:.4f}"
    told = f"Step {record.step}/{record.steps}: training loss={record.loss:.4f}{held_out}"
    return told, {**_metrics(record), "total_steps": record.steps}


def _metrics(record: StepRecord) -> dict[str, Any]:
    found = {"step": record.step, "train_loss": record.loss, "valid_loss": record.held_out_loss}
    return {name: value for name, value in found.items() if value is not None}


def _results(steps: list[StepRecord]) -> bytes:
    """The numbers of each step as a table."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(RESULTS)
    for record in steps:
        values = asdict(record) | {"train_loss": record.loss, "valid_loss": record.held_out_loss}
        table.writerow(["" if values[name] is None else values[name] for name in RESULTS])
    return text.getvalue().encode()
