from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rankfold.judging.intervals import RESAMPLES, interval, resampled, sign_test, wilson


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilsons_interval_is_scipys(hits, more):
    count = hits + more
    ours, theirs = wilson(hits, count), binomtest(hits, count).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=80))
def test_the_sign_test_is_scipys(gaps):
    unequal = [gap for gap in gaps if gap]
    above = sum(gap > 0 for gap in unequal)
    theirs = binomtest(above, len(unequal)).pvalue if unequal else 1.0
    assert sign_test(torch.tensor(gaps)) == pytest.approx(theirs)


def test_many_rows_are_drawn_in_parts_and_give_the_same_sums(monkeypatch):
    terms = torch.rand(50, 3, dtype=torch.float64)
    whole = resampled(terms, 3)
    monkeypatch.setattr("rankfold.judging.intervals.CHUNK", 1000)
    assert whole.shape == (RESAMPLES, 3)
    torch.testing.assert_close(resampled(terms, 3), whole, rtol=0, atol=1e-12)


def test_a_draw_is_the_same_whatever_it_sums():
    ones = torch.ones(30, 1, dtype=torch.float64)
    terms = torch.cat([ones, torch.rand(30, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(resampled(terms, 5)[:, :1], resampled(ones, 5))
    assert (resampled(ones, 5) == 30).all()


def test_the_spread_of_the_draws_is_the_means_standard_error():
    values = torch.randn(400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = resampled(values, 0)[:, 0] / 400
    assert float(means.std()) == pytest.approx(float(values.std(correction=0)) / 20, rel=0.03)
    found = interval(float(values.mean()), means)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.05)
