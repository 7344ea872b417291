from __future__ import annotations

import os
import signal
import threading

import pytest

from rankfold.train.stopping import CALLER, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_told_once(number):
    before = signal.getsignal(number)
    told = []
    with stop_requests(lambda: told.append("stopping")) as stop_signal:
        assert stop_signal() == 0
        os.kill(os.getpid(), number)
        assert stop_signal() == number
    assert told == ["stopping"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "raised", "code"),
    [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)],
)
def test_a_second_signal_ends_at_once(number, raised, code):
    with pytest.raises(raised) as caught, stop_requests(lambda: None):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), number)
    assert getattr(caught.value, "code", None) == code


def test_elsewhere_than_in_the_main_thread_nothing_is_caught():
    seen = []

    def work():
        with stop_requests(lambda: None) as stop_signal:
            seen.append(stop_signal())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_caller_can_ask_for_a_stop_in_any_thread():
    def ask(told: list[int]) -> None:
        wanted = False
        with stop_requests(lambda: None, lambda: wanted) as stop_signal:
            told.append(stop_signal())
            wanted = True
            told.append(stop_signal())

    here: list[int] = []
    ask(here)
    elsewhere: list[int] = []
    thread = threading.Thread(target=ask, args=(elsewhere,))
    thread.start()
    thread.join()
    assert here == elsewhere == [0, CALLER]
