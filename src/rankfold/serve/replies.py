"""Answers on their way from the engine's thread to those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rankfold.models.answering.answer import Answer
from rankfold.models.answering.asked import Asked
from rankfold.models.answering.drawing import Drawn
from rankfold.models.answering.loop import NOT_NUMBERS
from rankfold.serve.engine import FAILED, STOPPING, Engine, FullError
from rankfold.serve.refusing import RefusedError

RETRY_S = 1


class GoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, and the tokens since the last piece."""

    text: str
    drawn: list[Drawn]


@dataclass(eq=False)
class Reply:
    """One answer; ``tell`` takes what there is of it from the engine's thread."""

    number: int
    tell: Callable[[int, Piece | Answer], None]
    drawn: list[Drawn] = field(default_factory=list)
    is_gone: bool = False
    unsent: int = 0

    def hear(self, drawn: Drawn) -> None:
        self.drawn.append(drawn)

    def write(self, text: str) -> None:
        if text:
            self.tell(self.number, Piece(text, self._since()))

    def end(self, answer: Answer) -> None:
        self.tell(self.number, answer)

    def rest(self) -> list[Drawn]:
        """The tokens that no piece has told."""
        return self._since()

    def _since(self) -> list[Drawn]:
        new, self.unsent = self.drawn[self.unsent :], len(self.drawn)
        return new


class Replies:
    """The answers to one request, asked of ``engine`` at once.  Raises RefusedError if they cannot wait."""

    def __init__(self, engine: Engine, make: Sequence[Callable[[Reply], Asked]], answer_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Piece | Answer]] = asyncio.Queue()
        self.until = self._loop.time() + answer_s
        self.answer_s = answer_s
        self.all = [Reply(number, self._tell) for number in range(len(make))]
        if len(make) > engine.most:
            raise RefusedError(
                400, f"{len(make)} answers are asked for, and {engine.most} may wait (--queue)"
            )
        try:
            engine.ask([(one(reply), reply.end) for one, reply in zip(make, self.all, strict=True)])
        except FullError:
            told = f"{engine.most} answers are waited for already; try again"
            raise RefusedError(429, told, "queue_full", headers={"Retry-After": str(RETRY_S)}) from None

    def _tell(self, number: int, what: Piece | Answer) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, what))

    async def events(self, gone: asyncio.Future[object]) -> AsyncIterator[tuple[int, Piece | Answer]]:
        """Pieces and answers as they come, to the last answer.  Raises GoneError once ``gone`` is done, and
        RefusedError for an answer that cannot be given or takes too long."""
        left = len(self.all)
        try:
            while left:
                number, what = await self._next(gone)
                if isinstance(what, Answer):
                    left -= 1
                    if what.problem:
                        raise _refused(what.problem)
                yield number, what
        finally:
            for reply in self.all:
                reply.is_gone = True

    async def _next(self, gone: asyncio.Future[object]) -> tuple[int, Piece | Answer]:
        event = asyncio.ensure_future(self._events.get())
        try:
            async with asyncio.timeout_at(self.until):
                both: set[asyncio.Future[Any]] = {event, gone}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise RefusedError(408, f"the answer took more than {self.answer_s:g} s (--answer-s)") from None
        finally:
            if not event.done():
                event.cancel()
        if event.done() and not event.cancelled():
            return event.result()
        raise GoneError


def _refused(problem: str) -> RefusedError:
    statuses = {STOPPING: 503, FAILED: 500, NOT_NUMBERS: 500}
    return RefusedError(statuses.get(problem, 400), problem)
