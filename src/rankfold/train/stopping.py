"""Stopping a run between two steps when the user or the machine asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STATUS_OF_SIGNAL = 128  # a shell's convention: 130 for Ctrl-C (SIGINT), 143 for SIGTERM
CALLER = 65  # in the place of a signal's number, of which there are 64: the caller wants to stop
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests(
    on_first: Callable[[], None], asked: Callable[[], bool] = lambda: False
) -> Iterator[Callable[[], int]]:
    """Within the block the first SIGINT or SIGTERM is only noted, and ``on_first`` called; a second one
    ends the process' work at once, by KeyboardInterrupt or SystemExit.

    Yields a function that gives the number of the signal that came, CALLER if ``asked`` says that it is to
    stop, or 0.  Outside the main thread signals cannot be caught, and only ``asked`` counts."""
    came = 0

    def stop() -> int:
        return came or (CALLER if asked() else 0)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STATUS_OF_SIGNAL + number)
        came = number
        on_first()

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
