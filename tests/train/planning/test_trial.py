from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import rankfold.train.planning.trial
from conftest import tiny_llama
from rankfold.data.order.batches import GPU_MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS, micro_batch_tokens
from rankfold.data.order.batching import Packed, Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.lora import LoraConfig
from rankfold.models.base.precision import Precision
from rankfold.peft_surface import get_peft_model
from rankfold.train.planning.peak import MARGIN, step_memory
from rankfold.train.planning.recomputing import recompute_activations
from rankfold.train.planning.trial import Trial

ROWS = [EncodedRow(f"rows.jsonl:{n}", [5] * n, [5] * n) for n in range(3, 40)]
BATCHINGS = [Packed(), Padded(), Padded(tokens=64)]


@pytest.fixture
def trial() -> Trial:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    return Trial(model, ROWS, 0, Precision.of("float32"))


@pytest.mark.parametrize("batching", BATCHINGS, ids=str)
def test_a_trial_gives_a_speed_and_leaves_nothing(trial, batching):
    before, state = {n: p.clone() for n, p in trial.model.named_parameters()}, torch.get_rng_state()
    cost = trial.cost(batching)
    assert cost.per_token >= 0
    assert 0 < cost.forward < 1
    assert cost.seconds(batching.cut(ROWS), batching) > 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in trial.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_forward_keeps_is_counted(trial):
    """Of a linear layer and its adapter: the input, and the narrow product of A."""
    layer = nn.Sequential(nn.Linear(64, 48, bias=False))
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(700, 64)

    class OneLayer(Trial):
        def _forward(self, rows, batching):
            return self.model(x).sum()

    counted = OneLayer(model, ROWS, 0, trial.precision).kept_bytes_per_token(Padded())
    assert counted == (x.nbytes + 4 * 700 * 2) / len(ROWS[-1])


def test_what_is_counted_does_not_stay(trial):
    hidden: list[StorageWeakRef] = []

    class Watched(Trial):
        def _forward(self, rows, batching):
            losses, weight = super()._forward(rows, batching)
            assert losses.requires_grad
            assert hidden
            assert all(storage.expired() for storage in hidden)
            return losses, weight

    for layer in trial.model.get_base_model().model.layers:
        layer.register_forward_pre_hook(
            lambda _, given: hidden.append(StorageWeakRef(given[0].untyped_storage()))
        )
    assert Watched(trial.model, ROWS, 0, trial.precision).kept_bytes_per_token(Padded()) > 0


def test_recomputed_activations_keep_far_less(trial):
    """Two layers keep their inputs; the rest is the head's."""
    kept = trial.kept_bytes_per_token(Padded())
    recompute_activations(trial.model)
    assert trial.kept_bytes_per_token(Padded()) < kept / 3


def with_free(monkeypatch, free: float) -> None:
    monkeypatch.setattr(rankfold.train.planning.trial, "free_memory_bytes", lambda device: int(free))


def needed(trial, tokens: float, *, apart: bool) -> float:
    """Free bytes into which so many tokens fit with a margin."""
    memory, kept = step_memory(trial.model), trial.kept_bytes_per_token(Padded())
    return MARGIN * memory.held(memory.used(tokens, kept * tokens, torch.float32), apart=apart) + 1000


@pytest.mark.parametrize(("wanted", "recomputed"), [(None, False), (True, True), (False, False)])
def test_where_all_fits_activations_are_recomputed_only_if_asked(trial, monkeypatch, wanted, recomputed):
    with_free(monkeypatch, 1 << 40)
    batching, activations = trial.room(Packed(), 1024, wanted)
    assert (batching, activations.recomputed) == (Packed(), recomputed)
    assert f"{(1 << 40) / 1e9:.1f} GB are free" in activations.reason


def test_the_micro_batches_that_there_are_count_not_the_most_tokens_that_they_may_have(trial, monkeypatch):
    """Recomputing costs a forward, so it is not done for tokens that no step has."""
    with_free(monkeypatch, needed(trial, 100, apart=False))
    batching, activations = trial.room(Packed(), 100)
    assert 100 <= batching.tokens < 1024
    assert not activations.recomputed


def test_where_they_do_not_fit_micro_batches_shrink_before_activations_are_recomputed(trial, monkeypatch):
    with_free(monkeypatch, needed(trial, 60, apart=True))
    batching, activations = trial.room(Packed(), 1024)
    assert 60 <= batching.tokens < 100
    assert not activations.recomputed
    with_free(monkeypatch, needed(trial, 30, apart=True))  # the longest row has 39
    batching, activations = trial.room(Packed(), 1024)
    assert activations.recomputed


def test_a_row_that_cannot_fit_is_refused_before_it_is_tried(trial, monkeypatch):
    with_free(monkeypatch, 1 << 20)
    monkeypatch.setattr(rankfold.train.planning.trial, "free_swap_bytes", lambda device: 0)
    with pytest.raises(ConfigError, match=r"the longest row, of 39 tokens, does not fit: .*max_length"):
        trial.room(Packed(), 1024)
    monkeypatch.setattr(rankfold.train.planning.trial, "free_swap_bytes", lambda device: 1 << 40)
    assert trial.room(Packed(), 1024)[1].recomputed


@pytest.mark.parametrize(("times", "expected"), [(1, 1), (3.5, 3.5), (1e6, 16)])
def test_a_gpus_micro_batch_is_as_large_as_fits(trial, monkeypatch, times, expected):
    with_free(monkeypatch, needed(trial, times * MICRO_BATCH_TOKENS, apart=False))
    batching, activations = trial.room(Padded(tokens=GPU_MICRO_BATCH_TOKENS), MICRO_BATCH_TOKENS)
    assert batching.tokens == pytest.approx(expected * MICRO_BATCH_TOKENS, abs=5)
    assert not activations.recomputed


def test_as_many_tokens_as_were_given_are_taken_whatever_is_free(trial, monkeypatch):
    with_free(monkeypatch, needed(trial, 60, apart=True))
    batching, activations = trial.room(Padded(tokens=9999), 1024, fixed=True)
    assert (batching.tokens, activations.recomputed) == (9999, True)


def test_micro_batches_are_larger_on_a_gpu():
    assert micro_batch_tokens(torch.device("cpu")) < micro_batch_tokens(torch.device("cuda"))
