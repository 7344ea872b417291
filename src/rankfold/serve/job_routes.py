"""``/v1/fine_tuning/jobs``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query

from rankfold.errors import ConfigError
from rankfold.serve.job_request import JobRequest
from rankfold.serve.jobs import Jobs
from rankfold.serve.refusing import RefusedError
from rankfold.serve.speakers import Speakers
from rankfold.serve.uploads import Uploads
from rankfold.train.asked.advise import settle
from rankfold.train.asked.recipe import Recipe

Limit = Annotated[int, Query(ge=1, le=1000)]


def recipe_for(speakers: Speakers, uploads: Uploads, asked: JobRequest, out: Path) -> dict[str, Any]:
    """The settings of the run that a job is.  Raises RefusedError."""
    speaker, chosen = speakers.find(asked.model), asked.chosen
    settings: dict[str, Any] = {
        "out": out,
        "data": uploads.path(asked.training_file),
        "seed": asked.seed or 0,
    }
    if speaker.folder is None:
        settings["model"] = speakers.base_name
    else:
        settings["adapter"] = speaker.folder.resolve()
    if asked.validation_file is not None:
        settings["held_out"] = uploads.path(asked.validation_file)
    for name, value in (("epochs", chosen.n_epochs), ("rows_per_step", chosen.batch_size)):
        if value != "auto":
            settings[name] = value
    try:
        if chosen.learning_rate_multiplier != "auto":
            rows = max(1, settings["data"].read_bytes().count(b"\n"))
            rate = settle(Recipe.of(settings), rows, speakers.parameters).learning_rate
            settings["learning_rate"] = min(1.0, rate * chosen.learning_rate_multiplier)
        Recipe.of(settings)
    except ConfigError as error:
        raise RefusedError(400, str(error)) from error
    return settings


def routes(jobs: Jobs) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/fine_tuning/jobs")
    async def create(asked: JobRequest) -> dict[str, Any]:
        """Fine-tune the base, or an adapter further, on an uploaded file; one job runs at a time."""
        return jobs.add(asked)

    @router.get("/v1/fine_tuning/jobs")
    async def listed(limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
        return _page(jobs.all(), limit, after)

    @router.get("/v1/fine_tuning/jobs/{number}")
    async def job(number: str) -> dict[str, Any]:
        return jobs.facts(number)

    @router.post("/v1/fine_tuning/jobs/{number}/cancel")
    async def cancel(number: str) -> dict[str, Any]:
        return jobs.cancel(number)

    @router.post("/v1/fine_tuning/jobs/{number}/pause")
    async def pause(number: str) -> dict[str, Any]:
        return jobs.cancel(number, "paused")

    @router.post("/v1/fine_tuning/jobs/{number}/resume")
    async def resume(number: str) -> dict[str, Any]:
        return jobs.go_on(number)

    router.include_router(_looks(jobs))
    return router


def _looks(jobs: Jobs) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/fine_tuning/jobs/{number}/events")
    async def events(number: str, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
        return _page(jobs.events(number), limit, after)

    @router.get("/v1/fine_tuning/jobs/{number}/checkpoints")
    async def checkpoints(number: str, limit: Limit = 10, after: str | None = None) -> dict[str, Any]:
        return _page(jobs.checkpoints(number), limit, after)

    return router


def _page(found: Sequence[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    start = next((place + 1 for place, each in enumerate(found) if each["id"] == after), 0)
    data = list(found[start : start + limit])
    return {"object": "list", "data": data, "has_more": start + limit < len(found)}
