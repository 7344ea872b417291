from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from conftest import tiny_llama
from rankfold import Recipe
from rankfold.data.order.batches import epoch_steps
from rankfold.data.order.batching import Padded
from rankfold.data.tokens import cache
from rankfold.errors import DataError
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.keeping.listener import Listener
from rankfold.train.keeping.report import setting_rows
from rankfold.train.planning.plan import make_plan
from rankfold.train.planning.rows import prepare, read_data
from rankfold.train.planning.trial import Cost
from rankfold.train.run import decide


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(rows=None, **options) -> Recipe:
        data = write_rows(rows or joke_rows)
        return Recipe.of({"model": str(tiny_folder), "out": tmp_path / "run", "data": data} | options)

    return make


def plan_of(recipe: Recipe):
    return make_plan(recipe, prepare(recipe), Precision.of("float32"), Processes())


def test_a_plan_changes_no_weight_and_starts_as_the_base(recipe):
    plan = plan_of(recipe())
    ids = torch.randint(0, 49152, (1, 9))
    assert torch.equal(plan.model(input_ids=ids).logits, tiny_llama()(ids).logits)
    assert all(p.grad is None for p in plan.model.parameters())


def test_no_row_is_both_trained_and_held_out_and_none_is_lost(recipe, joke_rows):
    plan = plan_of(recipe())
    trained, held_out = ({row.origin for row in rows} for rows in (plan.train, plan.held_out))
    assert not trained & held_out
    assert len(trained | held_out) == len(joke_rows)


def test_rows_that_are_too_long_are_left_out_and_named(recipe, joke_rows):
    rows = [*joke_rows, {"prompt": "Long?", "completion": "Yes. " * 200}]
    plan = plan_of(recipe(rows, max_length=128))
    assert any("rows.jsonl:25 has" in note and "more than 128" in note for note in plan.notes)
    assert all(len(row) <= 128 for row in (*plan.train, *plan.held_out))


def test_copies_of_held_out_rows_are_left_out_and_counted(recipe, joke_rows):
    rows = read_data(recipe([*joke_rows, *joke_rows]), False)
    assert (len(rows.train), len(rows.held_out)) == (44, 2)
    assert not {e.messages[0].text for e in rows.train} & {e.messages[0].text for e in rows.held_out}
    assert rows.notes == ["2 training rows left out: copies or near copies of held-out rows"]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_expected_time_is_that_of_the_batches_that_the_run_will_have(recipe, batching):
    plan = replace(plan_of(recipe(epochs=3, batching=batching)), cost=Cost(0.5, 0.01, 0.25))
    rows, settings = plan.train, plan.settings
    groups = [
        group
        for step in epoch_steps(rows, settings.rows_per_step, plan.recipe.seed)
        for group in plan.batching.cut(step)
    ]
    wide = len if batching == "packed" else lambda row: 0
    tokens = sum(sum(map(wide, g)) if batching == "packed" else len(g) * max(map(len, g)) for g in groups)
    held_out = Padded(tokens=plan.batching.tokens).cut(plan.held_out)
    look = 0.25 * sum(0.5 + 0.01 * len(group) * max(map(len, group)) for group in held_out)
    training = 3 * (0.5 * len(groups) + 0.01 * tokens)
    general = 1.5 * 0.25 * 0.01 * plan.general.tokens
    answers = (64 + 32) * 16 * 0.25 * 0.01
    recall = look  # as many trained rows as held-out ones
    judging = 2 * (look + recall + general + answers)
    assert plan.expected_minutes == pytest.approx((training + 2 * look + judging) / 60)


def test_minutes_are_the_length_of_the_run(recipe):
    whole, short = plan_of(recipe(epochs=3)), plan_of(recipe(epochs=3, max_minutes=1e-6))
    assert whole.most_steps == whole.settings.steps
    assert (short.settings.steps, short.settings.warmup_steps, short.settings.rows_per_step) == (1, 1, 4)
    assert short.most_steps == 3 * math.ceil(len(short.train) / 4)
    assert "1 of " in short.settings.reasons["epochs"]
    asked = plan_of(recipe(epochs=3, max_minutes=1e-6, rows_per_step=8, max_steps=2))
    assert (asked.settings.steps, asked.settings.rows_per_step, asked.most_steps) == (1, 8, 2)


def test_the_plan_says_what_is_computed_as_one(recipe):
    plan = plan_of(recipe())
    layers = plan.model.config.num_hidden_layers
    norms = 2 * layers + 1
    fused = f"{layers} of {layers} SwiGLU blocks, {norms} of {norms} RMS norms"
    assert plan.fused == f"{fused}, {layers} of {layers} rotary attentions, by torch"


def test_held_out_rows_of_another_style_are_noticed(recipe, write_rows):
    held_out = write_rows([{"text": "It was cold."}], "held_out.jsonl")
    notes = read_data(recipe(held_out=held_out), False).notes
    assert any("held-out rows are plain" in note for note in notes)


def test_a_rank_that_no_weight_can_hold_is_told_of(recipe):
    with pytest.warns(UserWarning, match=r"rank exceeds(.|\n)*rank 33 on a 32x32 weight"):
        plan_of(recipe(rank=33))


def test_every_row_too_long_is_an_error(recipe):
    with pytest.raises(DataError, match=r"raise --max-length(.|\n)*rows.jsonl:1 has"):
        plan_of(recipe(max_length=8))


def test_a_plan_from_the_cache_is_the_same_plan(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    plain = plan_of(recipe())
    monkeypatch.setattr(cache, "LEAST_ROWS", 1)
    for _ in range(2):
        cached = plan_of(recipe())
        assert isinstance(cached.train, cache.CachedRows)
        assert list(cached.train) == plain.train
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_the_batching_is_as_given_and_told(recipe, kind):
    plan = plan_of(recipe(batching=kind))
    assert (plan.batching.kind, plan.batching.reason) == (kind, "as given")
    assert ("batching", kind, "as given") in setting_rows(plan)


def test_the_batching_is_chosen_with_a_reason(recipe):
    assert "of padded batches is padding, and packed blocks take" in plan_of(recipe()).batching.reason


def test_near_copies_of_rows_in_the_held_out_file_are_told(recipe, write_rows, joke_rows):
    told = joke_rows[3]["completion"] + " Nobody laughed, but they were polite about it. " * 4
    rows = [*joke_rows, {"prompt": "Joke?", "completion": told + "!"}]
    held_out = write_rows([{"prompt": "Joke?", "completion": told}], "held_out.jsonl")
    notes = read_data(recipe(rows, held_out=held_out), False).notes
    assert len(notes) == 1
    assert "1 training rows are near copies of rows in the held-out file" in notes[0]
    assert "rows.jsonl:25" in notes[0]


def test_any_source_is_read_with_its_shape_and_weight(recipe, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("task,reply\n" + "".join(f"t{number},r{number}\n" for number in range(40)))
    rows = read_data(recipe(data=f"{table}:2", shape="prompt=task,completion=reply"), False)
    assert (len(rows.train), len(rows.held_out)) == (76, 2)
    assert rows.shape == "40 rows of prompt-completion (as given), 2 times: 80 examples"


def test_bad_rows_are_left_out_only_as_far_as_the_recipe_allows(recipe, joke_rows):
    rows = [*joke_rows, {"prompt": "p", "completion": ""}]
    with pytest.raises(DataError, match="rows.jsonl:25: message 2"):
        read_data(recipe(rows), False)
    assert "1 bad rows left out:" in read_data(recipe(rows, skip_bad=0.1), False).notes[0]


def test_preference_pairs_are_refused_unless_the_chosen_answers_are_asked_for(recipe):
    pairs = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(9)]
    with pytest.raises(DataError, match="the rows are preference pairs"):
        read_data(recipe(pairs), False)
    assert len(read_data(recipe(pairs, shape="chosen"), False).train) == 8


def test_without_a_length_training_rows_are_cut_off_where_the_doctor_would(recipe):
    rows = [{"prompt": f"What is {n}?", "completion": f"{n} is a number. " * 3} for n in range(200)]
    rows.append({"prompt": "And all?", "completion": "word " * 300})
    plan = plan_of(recipe(rows))
    longest = max(map(len, plan.train))
    assert plan.lengths.cut == 64 * -(-longest // 64)
    assert plan.lengths.longest > 300
    [note] = [note for note in plan.notes if "too long" in note]
    assert re.search(r"rows.jsonl:201 has 3\d\d tokens, more than", note)


def test_rows_longer_than_the_model_can_read_are_left_out(recipe):
    rows = [{"prompt": f"What is {n}?", "completion": "word " * (600 if n < 3 else 9)} for n in range(20)]
    plan = plan_of(recipe(rows))
    assert max(map(len, plan.train)) <= 512
    assert sum("more than 512" in note for note in plan.notes) == 3


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_activations_are_recomputed_if_they_do_not_fit_in_another_process(recipe, elsewhere):
    class OneOfTwo(Processes):
        def highest(self, number):
            return max(number, elsewhere)

    plan = decide(recipe(), Listener(), OneOfTwo())
    layers = plan.model.get_base_model().model.layers
    assert (
        {layer.gradient_checkpointing for layer in layers}
        == {plan.activations.recomputed}
        == {bool(elsewhere)}
    )


@pytest.mark.parametrize(("shard_base", "told"), [(True, "a share of the base"), (False, "the whole base")])
def test_a_plan_says_how_many_processes_have_met(recipe, shard_base, told):
    plan = plan_of(recipe(shard_base=shard_base))
    assert "processes" not in {name for name, _, _ in setting_rows(plan)}
    [reason] = [
        r for n, v, r in setting_rows(replace(plan, processes=Processes(2))) if (n, v) == ("processes", "2")
    ]
    assert told in reason
