"""``/v1/files``: rows that clients send, and what jobs leave."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import APIRouter, Form, Query, Response, UploadFile
from fastapi.responses import FileResponse

from rankfold.errors import OutputError
from rankfold.files import require_space, staged_folder, write_whole
from rankfold.serve.refusing import RefusedError

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
FACTS, CONTENT = "file.json", "content"
PURPOSES = ("fine-tune",)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt")
MOST_NAME = 200


class Uploads:
    """Files in ``root``, each in a folder of its own with what is known of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def all(self) -> list[dict[str, Any]]:
        """The newest first."""
        found = [self.facts(each.name) for each in self.root.iterdir() if FILE_ID.fullmatch(each.name)]
        return sorted(found, key=lambda facts: (-facts["created_at"], facts["id"]))

    def facts(self, number: str) -> dict[str, Any]:
        """Raises RefusedError for a file that is not there."""
        try:
            found: dict[str, Any] = json.loads((self._folder(number) / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _missing(number) from error
        return found

    def path(self, number: str) -> Path:
        """The file itself.  Raises RefusedError."""
        facts = self.facts(number)
        return self._folder(number) / f"{CONTENT}{_suffix(facts['filename'])}"

    def add(self, source: BinaryIO, name: str, purpose: str, size: int = 0) -> dict[str, Any]:
        """Keep a copy of ``source``.  Raises RefusedError if there is no room."""
        import secrets

        number = f"file-{secrets.token_hex(12)}"
        folder = self.root / number
        try:
            require_space(folder, size)
            with staged_folder(folder) as staging:
                path = staging / f"{CONTENT}{_suffix(name)}"
                with path.open("wb") as written:
                    shutil.copyfileobj(source, written)
                facts = {
                    "id": number,
                    "object": "file",
                    "bytes": path.stat().st_size,
                    "created_at": int(time.time()),
                    "filename": name,
                    "purpose": purpose,
                    "status": "processed",
                }
                write_whole(staging / FACTS, json.dumps(facts))
        except (OSError, OutputError) as error:
            raise RefusedError(507, f"the file cannot be kept: {error}") from error
        return facts

    def delete(self, number: str) -> None:
        self.facts(number)
        shutil.rmtree(self._folder(number))

    def _folder(self, number: str) -> Path:
        if not FILE_ID.fullmatch(number):
            raise _missing(number)
        return self.root / number


def routes(uploads: Uploads) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/files")
    def upload(file: UploadFile, purpose: str = Form(max_length=64)) -> dict[str, Any]:
        """Keep a file of rows to train on."""
        name = Path(file.filename or "").name[-MOST_NAME:]
        if purpose not in PURPOSES:
            told = f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}"
            raise RefusedError(400, told, param="purpose")
        if _suffix(name) not in SUFFIXES:
            told = f"the file's name must end in one of {' '.join(SUFFIXES)}, got {name!r}"
            raise RefusedError(400, told, param="file")
        return uploads.add(file.file, name, purpose, file.size or 0)

    @router.get("/v1/files")
    def files(purpose: str | None = None, limit: int = Query(10_000, ge=1, le=10_000)) -> dict[str, Any]:
        found = [each for each in uploads.all() if purpose in (None, each["purpose"])]
        return {"object": "list", "data": found[:limit], "has_more": len(found) > limit}

    @router.get("/v1/files/{number}")
    def file(number: str) -> dict[str, Any]:
        return uploads.facts(number)

    @router.get("/v1/files/{number}/content", response_class=FileResponse)
    def content(number: str) -> Response:
        path = uploads.path(number)
        return FileResponse(path, media_type="application/octet-stream")

    @router.delete("/v1/files/{number}")
    def delete(number: str) -> dict[str, Any]:
        """Forget a file; jobs that have read it keep what they learnt."""
        uploads.delete(number)
        return {"id": number, "object": "file", "deleted": True}

    return router


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _missing(number: str) -> RefusedError:
    return RefusedError(404, f"there is no file {number!r:.100}", param="id")
