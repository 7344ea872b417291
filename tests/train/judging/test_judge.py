"""Held-out loss while a run goes on: the best weights, stopping early, the running mean, answers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rankfold import Recipe, fine_tune
from rankfold.errors import ConfigError
from rankfold.judging.losses import row_losses
from rankfold.train.keeping.checkpoints import latest_checkpoint
from rankfold.train.keeping.listener import Listener
from rankfold.train.run import resume

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    """24 rows, of which 22 are trained on in steps of 8: three steps an epoch."""

    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "out": tmp_path / "run", "data": write_rows(joke_rows)}
        fixed = {"epochs": 3, "learning_rate": 1e-2, "samples": 0, "precision": "float32"}
        return Recipe.of(settings | fixed | options)

    return make


class Watching(Listener):
    """Remembers the notes, and the held-out loss of the model as it is after every step."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []

    def on_plan(self, plan):
        self.plan = plan

    def on_note(self, note):
        self.notes.append(note)

    def on_step(self, record):
        plan = self.plan
        self.losses.append(float(row_losses(plan.model, plan.held_out, plan.pad_id).sum()))


def test_the_held_out_loss_is_looked_at_each_epoch_and_is_the_models(recipe):
    watching = Watching()
    result = fine_tune(recipe(), watching)
    seen = [(r.step, r.held_out_loss) for r in result.steps if r.held_out_loss is not None]
    assert [step for step, _ in seen] == [3, 6, 9]
    expected = [watching.losses[step - 1] / result.comparison.trained_tokens for step, _ in seen]
    assert [loss for _, loss in seen] == pytest.approx(expected)
    written = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in written] == [record.held_out_loss for record in result.steps]


def test_looking_changes_nothing_that_is_trained(recipe, tmp_path):
    """With dropout and with answers: what is drawn in a step is the step's own."""
    runs = [
        fine_tune(recipe(out=tmp_path / str(n), dropout=0.3, max_steps=5, **options))
        for n, options in enumerate(
            ({"evaluate_every_steps": 0}, {"evaluate_every_steps": 1, "sample_every_steps": 2, "samples": 1})
        )
    ]
    assert [r.loss for r in runs[0].steps] == [r.loss for r in runs[1].steps]
    assert all(r.held_out_loss is None for r in runs[0].steps)
    assert [bool(r.answers) for r in runs[1].steps] == [False, True, False, True, False]


@pytest.fixture
def spoiling(recipe, write_rows, tmp_path):
    """The answer that is learnt is not the one that is judged by, so the held-out loss rises."""
    train, judged = (
        write_rows([{"prompt": f"Question {n}?", "completion": 9 * answer} for n in range(rows)], name)
        for name, answer, rows in (("train.jsonl", " yes", 24), ("judged.jsonl", " cold", 4))
    )
    settings = {"learning_rate": 0.1, "schedule": "constant", "evaluate_every_steps": 1}

    def make(**options) -> Recipe:
        return recipe(data=train, held_out=str(judged), **settings | options)

    return make


def test_the_best_weights_are_kept_and_that_is_said(spoiling):
    watching = Watching()
    result = fine_tune(spoiling(), watching)
    best = min(range(9), key=watching.losses.__getitem__) + 1
    assert best < 9
    assert any(f"the weights after step {best} did best" in note for note in watching.notes)
    assert result.comparison.tuned_loss == pytest.approx(
        watching.losses[best - 1] / result.comparison.trained_tokens
    )
    plan = watching.plan
    now = float(row_losses(plan.model, plan.held_out, plan.pad_id).sum())
    assert now == pytest.approx(watching.losses[best - 1])
    kept = load_file(result.out / WEIGHTS)
    model = {name.replace(".default", ""): p for name, p in plan.model.named_parameters() if "lora" in name}
    assert all(torch.equal(kept[name], model[name]) for name in kept)


def test_with_patience_a_run_ends_when_looking_brings_nothing_better(spoiling):
    watching = Watching()
    result = fine_tune(spoiling(patience=2), watching)
    best = min(range(len(result.steps)), key=watching.losses.__getitem__) + 1
    assert len(result.steps) == best + 2 < 9
    assert any("stopped early: 2 evaluations" in note for note in watching.notes)
    assert result.comparison is not None


class StopAfter(Watching):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9, "patience": 4},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"ema_decay": 0.9}, {"patience": 4})),
    ],
)
def test_the_best_and_the_mean_are_the_same_after_an_interruption(spoiling, tmp_path, options):
    whole = fine_tune(spoiling(out=tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(spoiling(save_every_steps=1, **options), StopAfter(4))
    result = resume(tmp_path / "run")
    assert (result.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
    assert result.comparison == whole.comparison
    assert [r.held_out_loss for r in result.steps] == [r.held_out_loss for r in whole.steps]


def test_with_a_running_mean_the_mean_is_judged_and_saved(recipe):
    """Worked out anew from the checkpoints of every step."""
    result = fine_tune(recipe(ema_decay=0.5, evaluate_every_steps=0, save_every_steps=1, keep_checkpoints=9))
    folders = sorted((result.out / "checkpoints").iterdir())
    steps = [load_file(folder / "trained.safetensors") for folder in folders]
    checkpoint, _ = latest_checkpoint(result.out / "checkpoints")
    for name, mean in checkpoint.averaged.items():
        start = torch.zeros_like(mean) if "lora_B" in name else None
        if start is None:
            continue
        for number, trained in enumerate(steps, 1):
            decay = min(0.5, (1 + number) / (10 + number))
            start = decay * start + (1 - decay) * trained[name]
        torch.testing.assert_close(mean, start)
        saved = load_file(result.out / WEIGHTS)[name.replace(".default", "")]
        assert torch.equal(saved, mean)


@pytest.mark.parametrize(
    "option",
    [
        "label_smoothing",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("neftune_alpha", "weight_decay")),
    ],
)
def test_a_setting_of_the_method_changes_what_is_learnt(recipe, tmp_path, option):
    value = 5.0 if option == "neftune_alpha" else 0.3
    plain, other = (
        fine_tune(recipe(out=tmp_path / str(n), max_steps=3, **options))
        for n, options in enumerate(({}, {option: value}))
    )
    assert plain.steps[-1].loss != other.steps[-1].loss


@pytest.mark.slow
def test_moments_that_are_lost_are_started_anew_only_when_asked(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fine_tune(recipe(save_every_steps=1, keep_checkpoints=1), StopAfter(4))
    folder = next((tmp_path / "run" / "checkpoints").iterdir())
    (folder / "optimiser.safetensors").unlink()
    with pytest.raises(Exception, match="optimiser.safetensors is missing"):
        resume(tmp_path / "run")
    watching = Watching()
    result = resume(tmp_path / "run", listener=watching, reset_optimizer=True)
    assert len(result.steps) == 9
    assert any("the optimiser starts anew" in note for note in watching.notes)


def test_what_is_asked_for_is_what_is_used_and_kept(recipe):
    """bfloat16 on a CPU, and a tracker; both stand in the recipe by which the run goes on."""
    watching = Watching()
    result = fine_tune(recipe(precision="bfloat16", trackers="tensorboard", max_steps=2), watching)
    plan = watching.plan
    frozen = {p.dtype for p in plan.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in plan.model.parameters() if p.requires_grad)
    kept = (result.out / "recipe.yaml").read_text()
    assert "precision: bfloat16" in kept
    assert "tensorboard" in kept
    assert list((result.out / "trackers").rglob("events.out.tfevents.*"))


def test_what_was_learnt_and_forgotten_is_in_the_record_and_on_the_page(recipe):
    result = fine_tune(recipe())
    learnt = json.loads((result.out / "run.json").read_text())["learnt"]
    assert {change["domain"] for change in learnt["forgetting"]["domains"]} >= {
        "english",
        "code",
        "questions",
    }
    assert learnt["forgetting"]["whole"]["rise"]["value"] != 0
    assert learnt["recall"]["rows"] == result.comparison.rows  # as many as were held out
    assert {layer["kind"] for layer in learnt["moved"]} >= {"self_attn.q_proj", "mlp.down_proj"}
    assert all(layer["mean"] > 0 for layer in learnt["moved"])
    assert learnt["nothing"] == ""
    page = (result.out / "report.html").read_text()
    assert "What it forgot" in page
    assert "On general text the loss" in page
    assert "Nothing changed" not in page


def test_a_run_that_changed_nothing_says_so_first_and_why(recipe):
    result = fine_tune(recipe(learning_rate=1e-9))
    assert "times below the usual" in result.learnt.nothing
    page = (result.out / "report.html").read_text()
    assert page.index("Nothing changed") < page.index("Before and after")
    assert fine_tune(recipe(learning_rate=0.05, out=result.out.with_name("other"))).learnt.nothing == ""


@pytest.fixture
def general(write_rows):
    """Of other tokens than the rows are, so that what is learnt from them makes it less likely."""
    rows = [{"text": f"第{n}段文字，讲的是完全不同的事情。"} for n in range(6)]
    return str(write_rows(rows, "general.jsonl"))


LOOKING = {"learning_rate": 0.2, "schedule": "constant", "evaluate_every_steps": 1}


def test_the_best_weights_within_a_limit_of_forgetting_are_kept(recipe, general, tmp_path):
    """A high rate: each look is worse on general text, and better on the rows held out."""
    free = fine_tune(recipe(**LOOKING, general=general, max_steps=6, out=tmp_path / "free"))
    rise = free.learnt.forgetting.whole.rise.value
    assert rise > 0.01
    watching = Watching()
    limited = fine_tune(recipe(**LOOKING, general=general, max_steps=6, forget_limit=rise / 2), watching)
    assert limited.learnt.forgetting.whole.rise.value <= rise / 2
    assert limited.comparison.tuned_loss > free.comparison.tuned_loss
    assert any("did best on the held-out rows" in note for note in watching.notes)


def test_a_limit_that_no_look_keeps_is_told_and_the_least_is_kept(recipe, general):
    watching = Watching()
    fine_tune(recipe(**LOOKING, general=general, max_steps=4, forget_limit=1e-6), watching)
    told = "at no look had the loss on general text risen by 1e-06 or less"
    assert any(told in note for note in watching.notes)


def test_a_limit_needs_general_text(recipe):
    with pytest.raises(ConfigError, match="forget_limit"):
        fine_tune(recipe(general="none", forget_limit=0.1))


def test_without_general_text_nothing_is_told_of_it(recipe):
    result = fine_tune(recipe(general="none"))
    assert result.learnt.forgetting is None
    assert "What it forgot" not in (result.out / "report.html").read_text()


@pytest.mark.slow
def test_a_run_with_a_limit_goes_on_to_the_same_bits(recipe, general, tmp_path):
    options = {**LOOKING, "general": general, "forget_limit": 0.3, "max_steps": 6}
    whole = fine_tune(recipe(**options, out=tmp_path / "whole"))

    class Stopping(Listener):
        steps = 0

        def on_step(self, record):
            self.steps = record.step

        def wants_stop(self):
            return self.steps >= 3

    parts = tmp_path / "parts"
    assert fine_tune(recipe(**options, out=parts), Stopping()).interrupted
    resume(parts)
    expected, found = load_file(whole.out / WEIGHTS), load_file(parts / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
