from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.batches import collate, epoch_steps
from rankfold.data.encode import IGNORE, EncodedRow
from rankfold.errors import TrainingError
from rankfold.train.loop import MAX_GRADIENT_NORM, Trainer, learning_rate_at


def make_rows(count: int = 12) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place in range(count):
        ids = torch.randint(0, 49152, (6 + place,), generator=generator).tolist()
        rows.append(EncodedRow(f"f.jsonl:{place}", ids, [IGNORE] * 3 + ids[3:]))
    return rows


def make_model():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@given(st.integers(1, 500), st.data())
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(steps, data):
    warmup = data.draw(st.integers(1, steps))
    rates = [learning_rate_at(step, steps, warmup, 1.0) for step in range(1, steps + 1)]
    assert rates[warmup - 1] == max(rates) == 1.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup - 1 :] == sorted(rates[warmup - 1 :], reverse=True)
    assert min(rates) > 0
    assert learning_rate_at(steps + 1, steps, min(warmup, steps), 1.0) == pytest.approx(0, abs=1e-12)


def test_one_step_equals_plain_pytorch_on_the_whole_batch():
    """Micro-batches, masking and padding change nothing: every trained token weighs the same."""
    rows, model = make_rows(), make_model()
    plain = copy.deepcopy(model)
    groups = [rows[:2], rows[2:7], rows[7:]]
    Trainer(model, 0, lambda _: 1e-2, 1).step(1, groups)

    batch = collate(rows, 0, "cpu")
    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    plain(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_GRADIENT_NORM)
    optimiser.step()
    expected = trained(plain)
    for name, parameter in trained(model).items():
        # Adam's first step is lr * sign(gradient): elements with a gradient near 0 may differ in sign.
        close = torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, name


def test_training_learns_the_rows_and_leaves_the_base_alone():
    rows, model = make_rows(), make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a random head this small could say nothing whatever it is given
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, 0, lambda _: 2e-2, 30)
    losses: list[float] = []
    steps = [step for epoch in range(15) for step in epoch_steps(rows, 6, 0, epoch)]
    assert trainer.run(steps, lambda record: losses.append(record.loss), lambda: False) == 30
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])


def test_one_seed_gives_the_same_weights_bit_for_bit():
    results = []
    for _ in range(2):
        model = make_model()
        trainer = Trainer(model, 0, lambda step: learning_rate_at(step, 4, 1, 1e-2), 4)
        trainer.run(list(epoch_steps(make_rows(), 3, 5)), lambda _: None, lambda: False)
        results.append(trained(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change(poison):
    model = make_model()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _m, _i, output: output * poison)
    before = trained(model)
    trainer = Trainer(model, 0, lambda _: 1e-2, 1)
    with pytest.raises(TrainingError, match=r"step 3 gave loss nan(.|\n)*f.jsonl:0, f.jsonl:1"):
        trainer.step(3, [make_rows()[:2]])
    assert all(torch.equal(before[name], now) for name, now in trained(model).items())
    assert not trainer.optimiser.state


def test_the_run_stops_when_told_after_a_whole_step():
    model, records = make_model(), []
    trainer = Trainer(model, 0, lambda _: 1e-2, 4)
    done = trainer.run(list(epoch_steps(make_rows(), 3, 0)), records.append, lambda: len(records) == 2)
    assert done == len(records) == 2
    assert not model.training


def test_a_record_counts_what_it_should():
    rows = make_rows(3)
    record = Trainer(make_model(), 0, lambda _: 1e-3, 9).step(2, [rows])
    assert (record.step, record.steps, record.learning_rate) == (2, 9, 1e-3)
    assert record.tokens == 6 + 7 + 8
    assert record.trained_tokens == 3 + 4 + 5
    assert math.isfinite(record.gradient_norm)
    assert record.seconds > 0
