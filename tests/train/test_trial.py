from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import tiny_llama
from rankfold.data.batches import GPU_MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS, micro_batch_tokens
from rankfold.data.encode import EncodedRow
from rankfold.data.pack import Batching
from rankfold.lora import LoraConfig, get_peft_model
from rankfold.models.precision import Precision
from rankfold.train.trial import Trial

ROWS = [EncodedRow(f"rows.jsonl:{n}", [5] * n, [5] * n) for n in range(3, 40)]
BATCHINGS = [Batching("packed"), Batching("padded"), Batching("padded", tokens=64)]


@pytest.fixture
def trial() -> Trial:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    return Trial(model, ROWS, 0, Precision.of("float32"))


@pytest.mark.parametrize("batching", BATCHINGS, ids=str)
def test_a_trial_gives_a_speed_and_leaves_nothing(trial, batching):
    before, state = {n: p.clone() for n, p in trial.model.named_parameters()}, torch.get_rng_state()
    assert trial.tokens_per_second(batching) > 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in trial.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_on_a_cpu_a_micro_batch_is_as_large_as_its_speed_asks_for(trial):
    assert trial.fit(Batching("packed")) == Batching("packed", tokens=MICRO_BATCH_TOKENS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wanted", [MICRO_BATCH_TOKENS, 1 << 40])
def test_on_a_gpu_a_micro_batch_is_as_large_as_fits(trial, wanted):
    trial = replace(trial, model=trial.model.to("cuda"))
    fitted = trial.fit(Batching("padded", tokens=wanted)).tokens
    assert MICRO_BATCH_TOKENS <= fitted <= wanted
    assert fitted == wanted or fitted > GPU_MICRO_BATCH_TOKENS  # of so small a model


def test_micro_batches_are_larger_on_a_gpu():
    assert micro_batch_tokens(torch.device("cpu")) < micro_batch_tokens(torch.device("cuda"))
