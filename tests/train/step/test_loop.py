from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch

from conftest import labelled, randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batches import epoch_steps
from rankfold.data.order.batching import Padded
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import TrainingError
from rankfold.train.step.loop import Method, Trainer, draw_seed
from rankfold.train.step.objectives import Supervised
from rankfold.train.step.pace import Pace
from rankfold.train.step.schedule import learning_rate_at


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


def make_trainer(model, rate: float = 1e-2, steps: int = 1, **method) -> Trainer:
    return Trainer(model, 0, Pace(steps), Method(rates=lambda _: rate, **method))


class Cut(Padded):
    """Micro-batches that end where the test says."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        super().__init__()
        object.__setattr__(self, "ends", ends)

    def cut(self, rows):
        return [rows[a:b] for a, b in pairwise((0, *self.ends, len(rows)))]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_one_step_equals_plain_pytorch_on_the_whole_batch():
    """Micro-batches, masking and padding change nothing: every trained token weighs the same."""
    rows, model = make_rows(), make_model()
    plain = copy.deepcopy(model)
    make_trainer(model, 1e-2, batching=Cut((2, 7))).step(1, rows)

    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    plain(**labelled(rows)).loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
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
    trainer = make_trainer(model, 2e-2, 30)
    losses: list[float] = []
    steps = [step for epoch in range(15) for step in epoch_steps(rows, 6, 0, epoch)]
    trainer.run(steps, lambda record: losses.append(record.loss), lambda: False)
    assert trainer.step_done == len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])


def test_one_seed_gives_the_same_weights_bit_for_bit():
    results = []
    for _ in range(2):
        model = make_model()
        trainer = Trainer(model, 0, Pace(4), Method(rates=lambda step: learning_rate_at(step, 4, 1, 1e-2)))
        trainer.run(list(epoch_steps(make_rows(), 3, 5)), lambda _: None, lambda: False)
        results.append(trained(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change(poison):
    model = make_model()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _m, _i, output: output * poison)
    before = trained(model)
    trainer = make_trainer(model)
    with pytest.raises(TrainingError, match=r"step 3 gave loss nan(.|\n)*f.jsonl:0, f.jsonl:1"):
        trainer.step(3, make_rows()[:2])
    assert all(torch.equal(before[name], now) for name, now in trained(model).items())
    assert not trainer.optimiser.state


def test_the_run_stops_when_told_after_a_whole_step():
    model, records = make_model(), []
    trainer = make_trainer(model, 1e-2, 4)
    trainer.run(list(epoch_steps(make_rows(), 3, 0)), records.append, lambda: len(records) == 2)
    assert trainer.step_done == len(records) == 2
    assert not model.training


def test_a_record_counts_what_it_should():
    rows = make_rows(3)
    record = make_trainer(make_model(), 1e-3, 9).step(2, rows)
    assert (record.step, record.steps, record.learning_rate) == (2, 9, 1e-3)
    assert record.tokens == 6 + 7 + 8
    assert record.trained_tokens == 3 + 4 + 5
    assert math.isfinite(record.gradient_norm)
    assert record.seconds > 0


def test_lora_b_learns_faster_by_the_factor_given():
    """AdamW's first step is the rate times the sign of the gradient, so steps show rates."""
    model, rows = make_model(), make_rows(3)
    before = trained(model)
    make_trainer(model, 1e-3, b_rate_factor=16.0).step(1, rows)
    moved = {name: (now - before[name]).abs().max().item() for name, now in trained(model).items()}
    for name, distance in moved.items():
        assert distance == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=1e-2), name


def test_what_is_trained_whole_learns_at_a_rate_of_its_own():
    options = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"], "task_type": "CAUSAL_LM"}
    model, rows = get_peft_model(tiny_llama(), LoraConfig(r=4, **options)), make_rows(3)
    randomise(model)
    before = trained(model)
    make_trainer(model, 1e-3, b_rate_factor=2.0, whole_rate_factor=5.0).step(1, rows)
    moved = {name: (now - before[name]).abs().max().item() for name, now in trained(model).items()}
    factors = {"down_proj": 5e-3, "lora_B": 2e-3, "lora_A": 1e-3}
    assert {kind for kind in factors if any(kind in name for name in moved)} == {*factors}
    for name, distance in moved.items():
        expected = next(rate for kind, rate in factors.items() if kind in name)
        assert distance == pytest.approx(expected, rel=1e-2), name


def test_what_a_step_draws_depends_on_seed_step_and_process_and_on_nothing_drawn_before():
    """So a step with dropout can be done again, by itself, to the bit."""
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise(model)
    losses = []
    for step, drawn in ((3, 0), (3, 7), (4, 0)):
        torch.rand(drawn)
        trainer = make_trainer(copy.deepcopy(model).train(), batching=Cut(()))
        losses.append(trainer.step(step, make_rows()).loss)
    assert losses[0] == losses[1] != losses[2]
    seeds = {draw_seed(seed, step, process) for seed in (0, 1, 11) for step in (1, 11) for process in (0, 1)}
    assert len(seeds) == 12


def test_weight_decay_and_the_gradient_limit_are_pytorchs():
    model, rows = make_model(), make_rows(3)
    plain = copy.deepcopy(model)
    make_trainer(model, 1e-2, weight_decay=0.1, max_gradient_norm=1e-3).step(1, rows)
    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    plain(**labelled(rows)).loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    optimiser.step()
    expected = trained(plain)
    for name, parameter in trained(model).items():
        close = torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, name


def test_an_objective_is_all_that_the_loop_knows_of_the_loss():
    """One that counts twice and weighs thrice: the mean loss is 3/2 of it, and the gradients too."""

    class Heavier(Supervised):
        def sum(self, model, batch):
            total, weight = super().sum(model, batch)
            return 3 * total, 2 * weight

    rows = make_rows(4)
    records = [make_trainer(make_model(), objective=o).step(1, rows) for o in (Supervised(), Heavier())]
    assert records[1].loss == pytest.approx(1.5 * records[0].loss, rel=1e-6)
    assert records[1].gradient_norm == pytest.approx(1.5 * records[0].gradient_norm, rel=1e-5)
    assert records[1].trained_tokens == sum(row.trained_tokens for row in rows)
