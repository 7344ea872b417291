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
    be called, None for any; a page of another origin than the server's own and ``origins`` may not call it.
    ``most_open``: requests that come or are answered at a time, of up to ``most_bytes`` in ``body_s``."""

    key: str | None
    hosts: Collection[str] | None
    most_bytes: int
    body_s: float
    most_open: int = 1000
    origins: Collection[str] = field(default_factory=tuple)

    def check(self, scope: Scope) -> None:
        """Raises RefusedError for a request that may not be made."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
            page = urlsplit(headers.get("origin", "")).netloc
        except ValueError as error:
            raise RefusedError(400, f"the header Host or Origin is broken: {error}") from error
        if self.hosts is not None and host not in self.hosts:
            raise RefusedError(403, f"this server is not called {host!r:.100}; ask {sorted(self.hosts)[0]}")
        origin = headers.get("origin")
        if origin and origin not in self.origins and page != headers.get("host"):
            raise RefusedError(403, f"a page of {origin!r:.100} may not ask (--origins)")
        if self.key is not None and scope["path"] != OPEN:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.most_bytes:
            raise self.too_large()

    def too_large(self) -> RefusedError:
        return RefusedError(413, f"the request has more than {self.most_bytes:,} bytes (--body-mb)")

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
        self.open = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.guards.check(scope)
            self._check_room(scope)
        except RefusedError as error:
            await error.response()(scope, receive, send)  # type: ignore[arg-type]
            return
        self.open += 1
        try:
            await self.app(scope, _Body(receive, self.guards).receive, send)
        finally:
            self.open -= 1

    def _check_room(self, scope: Scope) -> None:
        if self.open >= self.guards.most_open and scope["path"] != OPEN:
            told = f"{self.guards.most_open} requests are open already; try again"
            raise RefusedError(429, told, "queue_full", headers={"Retry-After": "1"})


class _Body:
    """A request's body as it comes, no longer and for no more time than it may."""

    def __init__(self, receive: Any, guards: Guards) -> None:
        self._receive, self.guards = receive, guards
        self.left = guards.most_bytes
        self.until = asyncio.get_running_loop().time() + guards.body_s
        self.is_whole = False

    async def receive(self) -> Any:
        if self.is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.until):
                message = await self._receive()
        except TimeoutError:
            told = f"the request did not come within {self.guards.body_s:g} s (--body-s)"
            raise RefusedError(408, told, headers={"Connection": "close"}) from None
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise self.guards.too_large()
        self.is_whole = not message.get("more_body", False)
        return message
