"""The largest step, carried out before a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankfold.train.planning.preflight as module
from conftest import rankfold_command
from rankfold import Recipe, fine_tune
from rankfold.data.order.batches import epoch_steps
from rankfold.data.order.batching import Packed, Padded
from rankfold.data.order.pack import largest_size, largest_step
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.planning.plan import Plan, make_plan
from rankfold.train.planning.preflight import preflight
from rankfold.train.planning.rows import prepare
from rankfold.train.step.loop import Trainer


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(**options) -> Recipe:
        data = write_rows(joke_rows)
        return Recipe.of({"model": str(tiny_folder), "out": tmp_path / "run", "data": data} | options)

    return make


@pytest.fixture
def plan(recipe):
    def make(**options) -> Plan:
        asked = recipe(**options)
        return make_plan(asked, prepare(asked), Precision.of("float32"), Processes())

    return make


def step_of(plan: Plan) -> list[EncodedRow]:
    return largest_step(plan.train, plan.batching, plan.settings.rows_per_step, plan.recipe.seed)


def largest_of(plan: Plan) -> int:
    return largest_size(plan.batching, step_of(plan))


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.sampled_from([Padded(tokens=64), Packed(tokens=64)]),
)
def test_the_largest_micro_batch_is_that_of_all_steps_of_an_epoch(lengths, batching):
    rows = [EncodedRow(f"rows.jsonl:{n}", [5] * length, [5] * length) for n, length in enumerate(lengths)]
    groups = [group for step in epoch_steps(rows, 6, 3) for group in batching.cut(step)]
    found = largest_size(batching, largest_step(rows, batching, 6, 3))
    assert found == max(map(batching.size, groups))


def test_it_says_what_was_carried_out_and_leaves_the_model_as_it_was(plan):
    before = plan(ema_decay=0.9)
    weights, state = {n: p.clone() for n, p in before.model.named_parameters()}, torch.get_rng_state()
    after = preflight(before)
    found = after.preflight
    assert found is not None
    step = step_of(before)
    assert (found.rows, found.tokens) == (len(step), sum(map(len, step)))
    assert found.largest == largest_of(before)
    assert found.judging_seconds > 0
    assert found.seconds > 0
    assert found.peak_bytes > 100_000_000
    assert found.left_bytes > 0
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in after.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert after.batching == before.batching
    assert after.notes == before.notes


def test_a_run_computes_the_same_bits_with_it_and_without(recipe, monkeypatch, tmp_path):
    options = {"dropout": 0.1, "max_steps": 3, "precision": "float32"}
    with_it = fine_tune(recipe(**options, out=tmp_path / "with"))
    monkeypatch.setattr("rankfold.train.run.preflight", lambda plan: plan)
    without = fine_tune(recipe(**options, out=tmp_path / "without"))
    assert [r.loss for r in with_it.steps] == [r.loss for r in without.steps]
    assert with_it.comparison == without.comparison


def failing_above(monkeypatch, tokens: int, error: Exception) -> None:
    whole = Trainer.micro_batch

    def micro_batch(trainer, rows, times=1):
        if trainer.method.batching.size(rows) > tokens:
            raise error
        return whole(trainer, rows, times)

    monkeypatch.setattr(Trainer, "micro_batch", micro_batch)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_memory_runs_out_micro_batches_become_smaller_and_that_is_said(plan, monkeypatch, error):
    before = plan()
    limit = max(map(len, before.train)) + 5
    assert largest_of(before) > limit
    failing_above(monkeypatch, limit, error)
    after = preflight(before)
    assert after.preflight is not None
    assert after.preflight.largest <= limit
    assert after.batching.tokens < before.batching.tokens
    assert not after.activations.recomputed
    assert f"micro-batches have {after.batching.tokens:,} tokens at most, not 1,024" in after.notes[-1]
    assert all(p.grad is None for p in after.model.parameters())


def test_smaller_micro_batches_give_the_same_gradients(plan, monkeypatch):
    before = plan()
    failing_above(monkeypatch, max(map(len, before.train)), MemoryError())
    after = preflight(before)
    monkeypatch.undo()
    rows = list(before.train[: before.settings.rows_per_step])
    for parameter in (p for n, p in before.model.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    found = []
    for each in (before, after):
        method = module.method_of(each.recipe, each.settings, each.batching, each.precision)
        trainer = Trainer(each.model, each.pad_id, module.Pace(1), method)
        loss = trainer.mean_gradients(rows)
        found.append([torch.tensor(loss), *(p.grad.clone() for p in trainer.trained.values())])
        trainer.optimiser.zero_grad()
    assert len(after.batching.cut(rows)) > len(before.batching.cut(rows))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_where_a_row_by_itself_leaves_no_room_activations_are_recomputed(plan, monkeypatch):
    before, tried = plan(), []
    carried_out = module._carried_out

    def as_if_full(plan, step):
        tried.append((largest_size(plan.batching, step), plan.activations.recomputed))
        found = carried_out(plan, step)
        return found if plan.activations.recomputed else replace(found, left_bytes=0)

    monkeypatch.setattr(module, "_carried_out", as_if_full)
    after = preflight(before)
    assert after.activations.recomputed
    assert after.activations.reason == "a row by itself did not fit with them"
    assert [recomputed for _, recomputed in tried] == [False] * (len(tried) - 1) + [True]
    sizes = [size for size, _ in tried[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= max(map(len, before.train)) < sizes[0]


def test_a_row_that_does_not_fit_at_all_is_refused_with_what_to_do(plan, monkeypatch):
    before = plan(activation_checkpointing=False)
    failing_above(monkeypatch, 3, MemoryError("no more"))
    with pytest.raises(ConfigError, match=r"a row of \d+ tokens does not fit: no more; .*max_length"):
        preflight(before)


def test_too_little_for_the_end_of_a_run_is_refused_and_little_is_said(plan, monkeypatch):
    before = plan(activation_checkpointing=False, micro_batch_tokens=1)
    carried_out = module._carried_out
    monkeypatch.setattr(module, "_carried_out", lambda *a: replace(carried_out(*a), left_bytes=99_000_000))
    with pytest.raises(ConfigError, match=r"0.10 GB are left beside .* needs 0.1 GB more; .*max_length"):
        preflight(before)
    monkeypatch.setattr(module, "MARGIN", 50.0)
    monkeypatch.setattr(module, "_carried_out", lambda *a: replace(carried_out(*a), left_bytes=101_000_000))
    used = replace(before, resting_bytes=0)
    assert preflight(used).notes[-1].startswith("memory is tight: 0.1 GB stay free; ")


def test_half_precision_needs_room_for_the_programs_of_its_products(plan, monkeypatch):
    in_float32 = plan(activation_checkpointing=False, micro_batch_tokens=1)
    before = replace(in_float32, precision=Precision.of("bfloat16"))
    carried_out = module._carried_out
    monkeypatch.setattr(module, "_carried_out", lambda *a: replace(carried_out(*a), left_bytes=299_000_000))
    with pytest.raises(ConfigError, match=r"0.30 GB are left beside .* needs 0.3 GB more; .*max_length"):
        preflight(before)


def test_a_step_that_took_longer_than_promised_lengthens_the_run(plan):
    before = plan()
    slow = replace(before, cost=before.cost.times(1e-6))
    after = preflight(slow)
    assert after.preflight is not None
    promised = after.cost.seconds(after.batching.cut(step_of(after)), after.batching)
    assert promised == pytest.approx(after.preflight.seconds)
    assert after.expected_minutes > 1000 * slow.expected_minutes


def test_another_error_is_not_taken_for_memory(plan, monkeypatch):
    failing_above(monkeypatch, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        preflight(plan())


def test_what_was_carried_out_stands_in_the_plan_of_a_dry_run(tiny_folder, write_rows, joke_rows, tmp_path):
    options = ["--model", tiny_folder, "--data", write_rows(joke_rows), "--out", tmp_path / "run"]
    told = rankfold_command("train", *options, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "at the peak of its largest step" in " ".join(told.stdout.split())
