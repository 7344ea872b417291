from __future__ import annotations

import torch

from rankfold.train.step.average import Average


def test_the_average_is_the_weighted_sum_of_all_weights_so_far():
    weights = {"a": torch.zeros(3)}
    average = Average(weights, 0.9)
    expected = torch.zeros(3)
    for step in range(1, 200):
        weights["a"].copy_(torch.randn(3))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights["a"]
    torch.testing.assert_close(average.weights["a"], expected)


def test_the_model_has_the_average_within_the_block_and_its_own_weights_after_it_to_the_bit():
    weights = {"a": torch.randn(5)}
    average = Average(weights, 0.5)
    weights["a"].mul_(3)
    average.update(1)
    kept = weights["a"].clone()
    with average.in_place():
        assert torch.equal(weights["a"], average.weights["a"])
        assert not torch.equal(weights["a"], kept)
    assert torch.equal(weights["a"], kept)
