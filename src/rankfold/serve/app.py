"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rankfold import __version__
from rankfold.models.answering.sampling import Sampling
from rankfold.serve import job_routes
from rankfold.serve import uploads as uploads_module
from rankfold.serve.answering import Desk
from rankfold.serve.engine import Engine
from rankfold.serve.guards import Guarded, Guards
from rankfold.serve.job_routes import recipe_for
from rankfold.serve.jobs import Jobs
from rankfold.serve.metrics import Metrics
from rankfold.serve.refusing import ALL_ROUTES, RefusedError, of_fields
from rankfold.serve.schema import AdapterRequest, ChatRequest, CompletionRequest, UnloadRequest
from rankfold.serve.speakers import Speakers
from rankfold.serve.uploads import Uploads


@dataclass(frozen=True)
class Served:
    """What an application answers with; ``adapters``: the folder below which clients may load some, and
    ``jobs`` the one of their files and fine-tuning jobs."""

    engine: Engine
    speakers: Speakers
    sampling: Sampling
    answer_s: float
    adapters: Path | None = None
    jobs: Path | None = None


def application(served: Served, guards: Guards) -> Guarded:
    """The server as an ASGI application behind ``guards``."""
    clerk = ThreadPoolExecutor(1, "rankfold-clerk")
    jobs, routers = _jobs(served)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        work = [asyncio.create_task(jobs.run())] if jobs is not None else []
        try:
            yield
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await asyncio.to_thread(served.engine.stop)
            clerk.shutdown(cancel_futures=True)

    app = FastAPI(title="rankfold", version=__version__, lifespan=lifespan, responses=ALL_ROUTES)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_fault)
    if guards.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[*guards.origins], allow_methods=["*"], allow_headers=["*"]
        )
    desk = Desk(served.engine, served.speakers, served.sampling, served.answer_s, clerk)
    for router in (_watching(served), _models(served), _answers(desk), *routers):
        app.include_router(router)
    return Guarded(app, guards)


def _watching(served: Served) -> APIRouter:
    router, metrics = APIRouter(), Metrics(served.engine, served.speakers)

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether it answers; needs no key."""
        if not served.engine.is_alive:
            raise RefusedError(503, "the engine has ended")
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _models(served: Served) -> APIRouter:
    router, speakers = APIRouter(), served.speakers

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base and its adapters."""
        return {"object": "list", "data": [each.described() for each in speakers.by_name.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return speakers.find(name).described()

    @router.delete("/v1/models/{name:path}")
    async def delete(name: str) -> dict[str, Any]:
        """Unload an adapter; its files stay."""
        speakers.unload(served.engine, name)
        return {"id": name, "object": "model", "deleted": True}

    @router.post("/v1/load_lora_adapter")
    async def load(asked: AdapterRequest) -> dict[str, Any]:
        """Load an adapter below the folder that the server was started with."""
        folder = _below(served.adapters, asked.lora_path)
        speaker = await speakers.load(served.engine, asked.lora_name, folder)
        return speaker.described()

    @router.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest) -> dict[str, Any]:
        """Unload an adapter; its files stay."""
        return await delete(asked.lora_name)

    return router


def _answers(desk: Desk) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await desk.chat(asked, request)

    @router.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        return await desk.complete(asked, request)

    return router


def _jobs(served: Served) -> tuple[Jobs | None, list[APIRouter]]:
    if served.jobs is None:
        return None, []
    uploads = Uploads(served.jobs / "files")

    async def ready(name: str, folder: Path) -> None:
        await served.speakers.load(served.engine, name, folder)

    recipe = partial(recipe_for, served.speakers, uploads)
    jobs = Jobs(served.jobs / "jobs", uploads, recipe, ready)
    return jobs, [uploads_module.routes(uploads), job_routes.routes(jobs)]


def _below(root: Path | None, given: str) -> Path:
    """The folder that ``given`` names, which lies below ``root`` after all links.  Raises RefusedError."""
    if root is None:
        raise RefusedError(403, "this server loads no adapters (--adapter-root FOLDER)", param="lora_path")
    try:
        folder = (root / given).resolve()
        is_there = folder.is_relative_to(root.resolve()) and (folder / "adapter_config.json").is_file()
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        raise RefusedError(
            404, f"no adapter is called {given!r:.200} below the adapters' folder", param="lora_path"
        )
    return folder


async def _of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return of_fields(error.errors()).response()


async def _of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    refused = error if isinstance(error, RefusedError) else RefusedError(error.status_code, str(error.detail))
    refused.headers = error.headers
    return refused.response()


async def _of_fault(_: Request, error: Exception) -> JSONResponse:
    """Of ours: Starlette logs it with where it happened."""
    return RefusedError(500, f"the server failed: {type(error).__name__}; its log says more").response()
