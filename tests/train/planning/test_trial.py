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
from rankfold.lora import LoraConfig
from rankfold.models.base.precision import Precision
from rankfold.peft_surface import get_peft_model
from rankfold.train.planning.trial import MEMORY_SHARE, Trial, recompute_activations

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


@pytest.mark.parametrize(
    ("free", "wanted", "recomputed"),
    [(1 << 40, None, False), (1 << 20, None, True), (1 << 40, True, True), (1 << 20, False, False)],
)
def test_activations_are_recomputed_only_where_they_do_not_fit(trial, monkeypatch, free, wanted, recomputed):
    monkeypatch.setattr(rankfold.train.planning.trial, "free_memory_bytes", lambda device: free)
    batching, activations = trial.room(Packed(), wanted)
    assert (batching, activations.recomputed) == (Packed(), recomputed)
    assert f"{free / 1e9:.1f} GB are free" in activations.reason


@pytest.mark.parametrize(("times", "expected"), [(1, 1), (3.5, 3.5), (1e6, 16)])
def test_a_gpus_micro_batch_is_as_large_as_fits(trial, monkeypatch, times, expected):
    free = times * MICRO_BATCH_TOKENS * trial.kept_bytes_per_token(Padded()) / MEMORY_SHARE
    monkeypatch.setattr(rankfold.train.planning.trial, "free_memory_bytes", lambda device: free + 1)
    batching, activations = trial.room(Padded(tokens=GPU_MICRO_BATCH_TOKENS))
    assert (batching.tokens, activations.recomputed) == (expected * MICRO_BATCH_TOKENS, False)


def test_as_many_tokens_as_were_given_are_taken_whatever_is_free(trial, monkeypatch):
    monkeypatch.setattr(rankfold.train.planning.trial, "free_memory_bytes", lambda device: 1)
    batching, activations = trial.room(Padded(tokens=9999), fixed=True)
    assert (batching.tokens, activations.recomputed) == (9999, True)


def test_micro_batches_are_larger_on_a_gpu():
    assert micro_batch_tokens(torch.device("cpu")) < micro_batch_tokens(torch.device("cuda"))
