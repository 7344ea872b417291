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
        tokens = [
            each.token
            for each in draw(logits.expand(1000, -1), sampling, [], [randoms.random() for _ in range(1000)])
        ]
        found += torch.bincount(torch.tensor(tokens), minlength=24)
    possible = expected > 0
    assert found[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    squared = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    assert squared < quantile(max(1, freedom))


def test_the_same_number_draws_the_same_token_whatever_stands_beside_it():
    torch.manual_seed(3)
    logits, sampling = torch.randn(9, 2000) * 2, Sampling(temperature=1.0, top_p=0.9)
    randoms = [random.Random(n).random() for n in range(9)]
    together = draw(logits, sampling, [], randoms)
    alone = [draw(logits[n : n + 1], sampling, [], randoms[n : n + 1])[0] for n in range(9)]
    assert together == alone


@pytest.mark.parametrize("number", [0.0, 1 - 1e-16, 1.0])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible(number):
    shares = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    token = int(drawn((shares, None), torch.tensor([number], dtype=torch.float64)))
    assert token == (1 if number == 0 else 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told_for_their_row_alone(bad, temperature):
    logits = torch.randn(3, 50)
    logits[1, 7] = bad
    found = draw(logits, Sampling(temperature=temperature), [], [0.5] * 3)
    assert [each is None for each in found] == [False, True, False]
