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
