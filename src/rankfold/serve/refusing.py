"""What a client is told of a request that is not answered, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

FAULT_OF_OURS = 500


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What stands in every answer whose status is 400 or above."""

    error: ErrorBody


class RefusedError(HTTPException):
    """A request that is not answered: its HTTP status, why, and OpenAI's code and parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        status = self.status_code
        kind = kinds.get(status, "invalid_request_error" if status < FAULT_OF_OURS else "server_error")
        told = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def of_fields(problems: Sequence[Mapping[str, Any]]) -> RefusedError:
    """A request whose fields are wrong, all of them told."""
    told = [f"{_name(problem)}: {problem['msg'].removeprefix('Value error, ')}" for problem in problems[:20]]
    return RefusedError(400, "; ".join(told), param=_name(problems[0]))


def _name(problem: Mapping[str, Any]) -> str:
    if problem["loc"] == ("body",):
        return "body (JSON, with the header Content-Type: application/json)"
    names = [str(part) for part in problem["loc"]]
    return ".".join(names[1:] if names[:1] == ["body"] else names)[:200] or "body"


# The statuses that every route may answer, for the served schema.
ALL_ROUTES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": told}
    for status, told in {
        400: "the request is not well formed, or asks for what cannot be done",
        401: "the key is missing or wrong",
        403: "the page or the host that asks may not",
        404: "there is no such thing",
        408: "the request did not come to its end in time",
        409: "it cannot be done now",
        413: "the request is too large",
        429: "too many answers are waited for",
        500: "the server failed",
        503: "the server is stopping",
        507: "there is no room on the disk",
    }.items()
}
