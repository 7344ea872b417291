from __future__ import annotations

import json

import torch

from rankfold.train.judging.best import Best


def losses(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_lowest_sum_of_losses_is_the_best_and_the_others_are_counted():
    best, weights = Best(), {"a": torch.zeros(2)}
    for step, row_losses in enumerate((losses(3, 3), losses(1, 4), losses(9, 0), losses(5, 0)), 1):
        weights["a"].fill_(step)
        best.consider(step, row_losses, weights)
    assert best.step == 2
    assert torch.equal(best.weights["a"], torch.full((2,), 2.0))
    assert best.evaluations_since == 2


def test_the_state_comes_back_through_json_to_the_bit():
    best, other = Best(), Best()
    best.consider(3, losses(1 / 3, 2 / 7), {"a": torch.ones(1)})
    best.consider(4, losses(1, 1), {"a": torch.zeros(1)})
    other.restore(json.loads(json.dumps(best.state())), best.weights)
    assert (other.step, other.evaluations_since) == (3, 1)
    assert torch.equal(other.losses, best.losses)
    assert torch.equal(other.weights["a"], torch.ones(1))


def test_within_a_limit_the_lowest_loss_is_best_and_beyond_it_the_lowest_rise():
    best, weights = Best(limit=0.1), {"a": torch.zeros(1)}
    looks = [(5.0, 0.3), (4.0, 0.2), (3.0, 0.25), (6.0, 0.09), (2.0, 0.5), (5.5, 0.1), (5.6, 0.0)]
    kept = []
    for step, (loss, rise) in enumerate(looks, 1):
        best.consider(step, losses(loss), weights, rise)
        kept.append((best.step, best.is_within))
    assert kept == [(1, False), (2, False), (2, False), (4, True), (4, True), (6, True), (6, True)]
    assert best.evaluations_since == 1
    other = Best(limit=0.1)
    other.restore(json.loads(json.dumps(best.state())), best.weights)
    assert (other.step, other.rise, other.is_within) == (6, 0.1, True)


def test_a_checkpoint_from_before_there_was_a_limit_is_read():
    best = Best()
    best.restore({"step": 3, "losses": [1.0], "evaluations_since": 1}, {})
    assert (best.rise, best.is_within) == (0.0, True)
