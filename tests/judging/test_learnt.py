from __future__ import annotations

import pytest

from rankfold.judging.changes import Moved
from rankfold.judging.forgotten import Change, Forgetting
from rankfold.judging.held_out import Comparison
from rankfold.judging.intervals import Interval
from rankfold.judging.learnt import Learnt, cause, no_change


def comparison(base: float, tuned: float, spread: float = 0.01) -> Comparison:
    gap = tuned - base
    return Comparison(
        rows=40,
        trained_tokens=400,
        base_loss=base,
        tuned_loss=tuned,
        gap=gap,
        gap_low=gap - spread,
        gap_high=gap + spread,
        rows_improved=20,
    )


def layers(most: float) -> list[Moved]:
    return [Moved(kind="q_proj", layers=2, mean=most / 2, most=most, most_in="a.0.q_proj")]


def forgetting(divergence: float) -> Forgetting:
    apart = Interval(divergence, divergence, divergence)
    rise = Interval(0.0, 0.0, 0.0)
    return Forgetting(
        whole=Change(domain="general text", rows=9, tokens=9, base_loss=1.0, rise=rise, divergence=apart)
    )


@pytest.mark.parametrize(
    ("seen", "unseen", "expected"),
    [
        ((3.0, 2.0), (3.0, 2.1), "90% of what it learnt holds on rows that it has not seen"),
        (
            (3.0, 0.1),
            (3.0, 2.5),
            "17% of what it learnt holds on rows that it has not seen; the rest it knows",
        ),
        ((3.0, 0.1), (3.0, 3.5), "0% of what it learnt holds"),
        ((3.0, 2.99), (3.0, 2.99), "on held-out rows 2.990 (base 3.000)"),
    ],
)
def test_how_much_of_what_was_learnt_holds_elsewhere_is_told(seen, unseen, expected):
    told = Learnt(moved=[], recall=comparison(*seen)).recalled(comparison(*unseen))
    assert expected in told
    assert told.startswith("on 40 rows that it was trained on the loss is")


@pytest.mark.parametrize(
    ("gap", "spread", "divergence", "expected"),
    [
        (0.0, 0.0, 0.0, True),
        (0.0017, 0.004, 0.0018, True),  # as measured: a rate of 1e-7 in bfloat16
        (-0.0005, 0.0001, None, True),
        (-0.005, 0.001, 0.001, False),
        (-0.3, 0.1, 0.2, False),
        (0.001, 0.01, 0.05, False),  # other on general text
    ],
)
def test_a_run_that_changed_nothing_is_known(gap, spread, divergence, expected):
    told = None if divergence is None else forgetting(divergence)
    assert no_change(comparison(3.0, 3.0 + gap, spread), told) is expected


@pytest.mark.parametrize(
    ("most", "rate", "steps", "expected"),
    [
        (0.0, 1e-7, 50, "no gradient reached the adapter"),
        (1e-6, 1e-7, 50, "the learning rate 1e-07 is 4,000 times below the usual 0.0004"),
        (1e-3, 4e-4, 2, "2 steps are too few"),
        (1e-9, 4e-4, 50, "no layer moved by more than 1.0e-09 of its weight"),
        (1e-2, 4e-4, 50, "look at targets"),
    ],
)
def test_the_likely_cause_of_it_is_told(most, rate, steps, expected):
    assert expected in cause(layers(most), rate, 4e-4, steps)
