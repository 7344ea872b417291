"""The thread that answers: questions come in by a queue, and the model changes between two tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from rankfold.models.answering.answer import Answer
from rankfold.models.answering.asked import Asked
from rankfold.models.answering.loop import Loop

LOG = logging.getLogger("rankfold.serve")
STOPPING = "the server is stopping"
FAILED = "the server failed while it answered; its log says more"


class FullError(Exception):
    """As many answers are waited for as may be."""


class EndedError(Exception):
    """The engine has ended, or failed, before a change was made."""


@dataclass(frozen=True, slots=True)
class _Question:
    asked: Asked
    done: Callable[[Answer], object]


@dataclass(frozen=True, slots=True)
class _Change:
    """What is to be done to the model; not before no row is answered by the adapter ``unused``."""

    call: Callable[[Loop], Any]
    unused: str | None = None
    result: Future[Any] = field(default_factory=Future)


@dataclass
class Counts:
    """What was done since the start."""

    answers: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0


class Engine:
    """``ready`` makes the model fit to answer, for as long as nothing of it is changed, and ``make_loop`` is
    called in that once.  No more than ``most`` answers wait or are written."""

    def __init__(
        self, ready: Callable[[], AbstractContextManager[object]], make_loop: Callable[[], Loop], most: int
    ) -> None:
        self.most, self.pending, self.counts = most, 0, Counts()
        self._ready, self._make_loop = ready, make_loop
        self._loop: Loop | None = None
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[_Question | _Change | None] = SimpleQueue()
        self._changes: list[_Change] = []
        self._numbers = count()
        self._done: dict[int, Callable[[Answer], object]] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="rankfold-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the token that is being computed; who waits is told so."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def written_at_once(self) -> int:
        return 0 if self._loop is None else len(self._loop.rows)

    def ask(self, asked: list[tuple[Asked, Callable[[Answer], object]]]) -> None:
        """Answer each prompt, and call what stands beside it with the answer, in the engine's thread.
        Raises FullError if not all of them can wait."""
        with self._lock:
            if self._is_stopping or self.pending + len(asked) > self.most:
                raise FullError
            self.pending += len(asked)
        for each, done in asked:
            self._inbox.put(_Question(each, done))

    def change(self, call: Callable[[Loop], Any], unused: str | None = None) -> Future[Any]:
        """Let ``call`` change the model while nothing is computed, and, if an adapter is to be ``unused``,
        not before all its answers are there."""
        change = _Change(call, unused)
        self._inbox.put(change)
        return change.result

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                with self._ready():
                    self._loop = self._loop or self._make_loop()
                    due = self._answer(self._loop)
                    self._loop.company.leave()
                for change in due:
                    self._do(change, self._loop)
            except Exception:
                LOG.exception("answering failed")
                self._loop = None
                self._fail_all(FAILED)
        while not self._inbox.empty():
            self._take(self._inbox.get())
        self._fail_all(STOPPING)

    def _answer(self, loop: Loop) -> list[_Change]:
        """Answer until the model is to be changed, which is given, or all is to end."""
        while not self._is_stopping:
            self._take_new(loop.is_busy)
            used = {row.adapter for row in (*loop.rows, *loop.waiting)}
            if due := [each for each in self._changes if each.unused is None or each.unused not in used]:
                self._changes = [each for each in self._changes if each not in due]
                return due
            for number, answer in loop.turn():
                self._end(number, answer)
        return []

    def _take_new(self, is_busy: bool) -> None:
        """Take what has come in; wait for it if there is nothing to do."""
        try:
            self._take(self._inbox.get(block=not is_busy))
            while True:
                self._take(self._inbox.get(block=False))
        except Empty:
            return

    def _take(self, item: _Question | _Change | None) -> None:
        if item is None:
            with self._lock:
                self._is_stopping = True
        elif isinstance(item, _Change):
            self._changes.append(item)
        else:
            number = next(self._numbers)
            self._done[number] = item.done
            if self._loop is not None:
                self._loop.put(number, item.asked)

    def _do(self, change: _Change, loop: Loop) -> None:
        if not change.result.set_running_or_notify_cancel():
            return
        try:
            change.result.set_result(change.call(loop))
        except Exception as error:
            change.result.set_exception(error)

    def _end(self, number: int, answer: Answer) -> None:
        with self._lock:
            self.pending -= 1
        self.counts.answers += 1
        self.counts.failed += bool(answer.problem)
        self.counts.prompt_tokens += answer.prompt_tokens
        self.counts.written_tokens += len(answer.tokens)
        self._done.pop(number)(answer)

    def _fail_all(self, problem: str) -> None:
        for number in list(self._done):
            self._end(number, Answer.missing(problem))
        for change in self._changes:
            change.result.set_exception(EndedError(problem))
        self._changes = []
