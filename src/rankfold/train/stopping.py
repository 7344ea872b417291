"""Stopping a run between two steps when the user or the machine asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STATUS_OF_SIGNAL = 128  # a shell's convention: 130 for Ctrl-C (SIGINT), 143 for SIGTERM
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests(on_first: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Within the block the first SIGINT or SIGTERM is only noted, and ``on_first`` called; a second one
    ends the process' work at once, by KeyboardInterrupt or SystemExit.

    Yields a function that gives the number of the signal that came, or 0.  Outside the main thread
    signals cannot be caught, and it always gives 0."""
    came = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, _: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STATUS_OF_SIGNAL + number)
        came = number
        on_first()

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
