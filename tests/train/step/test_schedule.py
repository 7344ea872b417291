from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.train.step.schedule import SCHEDULES, WSD_DECAY_SHARE, learning_rate_at


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(steps=st.integers(1, 500), data=st.data())
def test_the_rate_rises_to_its_peak_and_never_rises_again(schedule, steps, data):
    warmup = data.draw(st.integers(1, steps))
    rates = [learning_rate_at(step, steps, warmup, 1.0, schedule) for step in range(1, steps + 1)]
    assert rates[warmup - 1] == max(rates) == 1.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup - 1 :] == sorted(rates[warmup - 1 :], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
@given(steps=st.integers(2, 500))
def test_the_step_after_the_last_would_have_rate_0(schedule, steps):
    assert learning_rate_at(steps + 1, steps, 1, 1.0, schedule) == pytest.approx(0, abs=1e-12)


def test_the_cosine_is_pytorchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=40)
    for step in range(1, 41):  # ours at the end of the warm-up is theirs at 0
        assert learning_rate_at(step, 40, 1, 0.3) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-6, abs=1e-9
        )
        optimiser.step()
        theirs.step()


def test_wsd_stays_at_its_peak_until_the_last_fifth():
    rates = [learning_rate_at(step, 100, 10, 1.0, "wsd") for step in range(1, 101)]
    falling = [rate for rate in rates[10:] if rate < 1.0]
    assert len(falling) == pytest.approx(90 * WSD_DECAY_SHARE, abs=1)
