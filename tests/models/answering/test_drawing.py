"""What is drawn follows the distribution that transformers' processors leave."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rankfold.models.answering.drawing import CANDIDATES, draw, drawn, shares_of
from rankfold.models.answering.sampling import Sampling

DRAWS = 40_000
# The chi-squared distribution's 0.9999 quantile by degrees of freedom (Wilson and Hilferty 1931).
NORMAL_9999 = 3.719


def keys_of(randoms: random.Random, count: int) -> list[int]:
    return [randoms.getrandbits(63) for _ in range(count)]


def quantile(freedom: int) -> float:
    part = 2 / (9 * freedom)
    return freedom * (1 - part + NORMAL_9999 * part**0.5) ** 3


def theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The likelihoods that transformers draws from."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone()).softmax(dim=-1)


def ours(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    shares, tokens = shares_of(logits, sampling)
    whole = shares / shares.sum(dim=-1, keepdim=True)
    return whole if tokens is None else torch.zeros_like(logits).scatter(1, tokens, whole)


SETTINGS = [
    {},
    {"temperature": 0.4},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
]


def sampling_of(settings: dict) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, **settings})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 3 * CANDIDATES])
def test_the_likelihoods_are_those_of_transformers(settings, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary) * torch.tensor([0.0, 0.1, 1.0, 2.0, 4.0, 8.0])[:, None]
    logits += 1e-3 * torch.rand(6, vocabulary)  # without ties, whose order is nobody's business
    sampling = sampling_of(settings)
    assert torch.allclose(ours(logits, sampling), theirs(logits, sampling), atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_likelihoods(settings):
    torch.manual_seed(1)
    logits, sampling = torch.randn(1, 24) * 1.5, sampling_of(settings)
    expected = theirs(logits, sampling)[0] * DRAWS
    randoms = random.Random(2)
    found = torch.zeros(24)
    for _ in range(DRAWS // 1000):
        tokens = [each.token for each in draw(logits.expand(1000, -1), sampling, [], keys_of(randoms, 1000))]
        found += torch.bincount(torch.tensor(tokens), minlength=24)
    possible = expected > 0
    assert found[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    squared = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    assert squared < quantile(max(1, freedom))


def test_the_same_number_draws_the_same_token_whatever_stands_beside_it():
    torch.manual_seed(3)
    logits, sampling = torch.randn(9, 2000) * 2, Sampling(temperature=1.0, top_p=0.9)
    keys = keys_of(random.Random(0), 9)
    together = draw(logits, sampling, [], keys)
    alone = [draw(logits[n : n + 1], sampling, [], keys[n : n + 1])[0] for n in range(9)]
    assert together == alone


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_rounding_does_not_change_what_is_drawn_even_of_tokens_that_are_all_alike(top_p):
    torch.manual_seed(4)
    logits, sampling = torch.randn(500, 5000) * 0.1, Sampling(temperature=1.0, top_p=top_p)
    keys = keys_of(random.Random(5), 500)
    rounded = logits + 1e-6 * torch.randn(500, 5000)
    before, after = (draw(each, sampling, [], keys) for each in (logits, rounded))
    assert sum(one != other for one, other in zip(before, after, strict=True)) <= 1


def test_what_has_no_share_is_never_drawn():
    shares = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).expand(2000, -1)
    assert {*drawn((shares, None), keys_of(random.Random(6), 2000)).tolist()} == {1, 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told_for_their_row_alone(bad, temperature):
    logits = torch.randn(3, 50)
    logits[1, 7] = bad
    found = draw(logits, Sampling(temperature=temperature), [], [5] * 3)
    assert [each is None for each in found] == [False, True, False]
