"""A run that fits into its time, by a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.train.step.pace import Pace
from rankfold.train.step.schedule import learning_rate_at

WARMUP = 3


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, step_seconds: Callable[[int], float], done: int = 0, until: int = 10_000):
    """Steps of so many seconds, as the trainer takes them; the rate of each."""
    rates = []
    while (left := pace.left(done)) and done < until:
        pace.begin_step(left)
        rates.append(learning_rate_at(pace.ahead, pace.steps, WARMUP, 1.0))
        clock.now += step_seconds(done)
        pace.end_step()
        done += 1
    return rates


def test_without_a_time_the_position_is_the_step():
    pace = Pace(20)
    rates = run(pace, Clock(), lambda step: 1.0)
    assert rates == [learning_rate_at(step, 20, WARMUP, 1.0) for step in range(1, 21)]
    assert pace.position == 20


def test_at_the_speed_that_was_planned_a_timed_run_is_the_planned_one():
    clock = Clock()
    rates = run(Pace(20, 40.0, 2.0, clock=clock), clock, lambda step: 2.0)
    assert rates == pytest.approx([learning_rate_at(step, 20, WARMUP, 1.0) for step in range(1, 21)])


@given(
    steps=st.integers(20, 200),
    speeds=st.lists(st.floats(0.3, 3.0), min_size=1, max_size=6),
    most=st.integers(20, 2000),
)
def test_whatever_the_machine_does_the_fall_ends_where_the_time_or_the_rows_do(steps, speeds, most):
    clock, seconds = Clock(), 2.0 * steps
    pace = Pace(steps, seconds, 2.0, max(most, steps), clock)
    slowness = lambda step: 2.0 * speeds[min(step * len(speeds) // steps, len(speeds) - 1)]  # noqa: E731
    rates = run(pace, clock, slowness)
    assert clock.now - 100 <= seconds + 2.0 * 3.0 * 3  # a few steps: how slow they are is seen afterwards
    assert rates[-1] < 0.1 or len(rates) < WARMUP + 1 or pace.remaining < 2.0 * 3.0 * 3
    falls = rates[rates.index(max(rates)) :]
    assert falls == sorted(falls, reverse=True)


@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.7, 3.0])
def test_a_machine_of_another_speed_uses_its_time_to_the_last_step(slowness):
    clock = Clock()
    rates = run(Pace(100, 200.0, 2.0, 1000, clock), clock, lambda step: 2.0 * slowness)
    assert 200 - 2 * 2 * slowness <= clock.now - 100 <= 200
    assert rates[-1] < 0.01
    assert len(rates) == pytest.approx(100 / slowness, abs=2)


def test_a_machine_that_gets_slower_lets_the_rate_fall_earlier():
    clock = Clock()
    rates = run(Pace(100, 200.0, 2.0, 1000, clock), clock, lambda step: 2.0 if step < 50 else 6.0)
    plain = [learning_rate_at(step, 100, WARMUP, 1.0) for step in range(1, 101)]
    assert rates[:50] == pytest.approx(plain[:50])
    assert rates[-1] < 0.01
    assert rates[58] < plain[58]


def test_what_comes_between_steps_is_time_too():
    clock = Clock()
    pace, done = Pace(100, 200.0, 2.0, 1000, clock), 0
    while left := pace.left(done):
        pace.begin_step(left)
        clock.now += 2.0
        pace.end_step()
        done += 1
        clock.now += 20.0 if done == 30 else 0.0
    assert done == 90
    assert clock.now - 100 <= 200
    assert pace.position == pytest.approx(100)


def test_a_run_goes_on_from_its_state_as_if_nothing_had_come_between():
    clock = Clock()
    slowness = lambda step: 2.0 + 0.25 * (step % 4)  # noqa: E731
    whole = run(Pace(100, 200.0, 2.0, 1000, clock), clock, slowness)
    first = Pace(100, 200.0, 2.0, 1000, clock)
    half = run(first, clock, slowness, until=40)
    clock.now += 2.0**20
    again = Pace(100, 200.0, 7.0, 1000, clock)
    again.restore(first.state(), 40)
    assert half + run(again, clock, slowness, done=40) == whole


def test_a_checkpoint_that_knows_no_pace_is_at_its_step():
    pace = Pace(20)
    pace.restore({}, 7)
    assert pace.left(7) == 13
    pace.begin_step(13)
    assert (pace.ahead, pace.position) == (8, 7)  # a step that fails has not been one
    pace.end_step()
    assert pace.position == 8


def test_a_time_too_short_for_a_step_is_one_step():
    clock = Clock()
    assert len(run(Pace(1, 1e-9, 2.0, 50, clock), clock, lambda step: 2.0)) == 1
