"""Who may ask, and how much: before anything of a request is looked at."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rankfold.serve.refusing import RefusedError

Scope = Mapping[str, Any]
OPEN = "/health"  # which needs no key: those who watch a server have none


@dataclass(frozen=True)
class Guards:
    """``key``: what clients must send, None if they need not.  ``hosts``: the names by which the server may
    be called, None for any; a page of another origin than these ``hosts`` and ``origins`` may not call it."""

    key: str | None
    hosts: Collection[str] | None
    most_bytes: int
    body_s: float
    origins: Collection[str] = field(default_factory=tuple)

    def check(self, scope: Scope) -> None:
        """Raises RefusedError for a request that may not be made."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.hosts is not None and host not in self.hosts:
            raise RefusedError(403, f"this server is not called {host!r:.100}; ask {sorted(self.hosts)[0]}")
        self._check_origin(headers.get("origin"), headers.get("host", ""))
        if self.key is not None and scope["path"] != OPEN:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.most_bytes:
            raise self.too_large()

    def too_large(self) -> RefusedError:
        return RefusedError(413, f"the request has more than {self.most_bytes:,} bytes (--body-mb)")

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin and origin not in self.origins and urlsplit(origin).netloc != host:
            raise RefusedError(403, f"a page of {origin!r:.100} may not ask (--origins)")

    def _check_key(self, sent: str) -> None:
        kind, _, key = sent.partition(" ")
        known = hmac.compare_digest(key.strip().encode(), (self.key or "").encode())
        if kind.lower() != "bearer" or not known:
            told = "the header Authorization: Bearer KEY is missing or wrong"
            raise RefusedError(401, told, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Guarded:
    """An ASGI application behind ``guards``."""

    def __init__(self, app: Any, guards: Guards) -> None:
        self.app, self.guards = app, guards

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.guards.check(scope)
        except (RefusedError, ValueError) as error:
            refused = (
                error if isinstance(error, RefusedError) else RefusedError(400, "the Host header is broken")
            )
            await refused.response()(scope, receive, send)  # type: ignore[arg-type]
            return
        body = _Body(receive, self.guards)
        try:
            await self.app(scope, body.receive, body.watched(send))
        except RefusedError as error:
            if not body.has_answered:
                await error.response()(scope, receive, send)  # type: ignore[arg-type]


class _Body:
    """A request's body as it comes, no longer and for no more time than it may."""

    def __init__(self, receive: Any, guards: Guards) -> None:
        self._receive, self.guards = receive, guards
        self.left = guards.most_bytes
        self.until = asyncio.get_running_loop().time() + guards.body_s
        self.is_whole = self.has_answered = False

    async def receive(self) -> Any:
        if self.is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.until):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(408, f"the request did not come within {self.guards.body_s:g} s",
                               headers={"Connection": "close"}) from None  # fmt: skip
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise self.guards.too_large()
        self.is_whole = not message.get("more_body", False)
        return message

    def watched(self, send: Any) -> Any:
        async def watching(message: Any) -> None:
            self.has_answered = True
            await send(message)

        return watching
