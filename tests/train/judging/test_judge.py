"""Held-out loss while a run goes on: the best weights, stopping early, the running mean, answers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rankfold import Recipe, fine_tune
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


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"ema_decay": 0.9, "patience": 4}, {"patience": 4}])
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


@pytest.mark.parametrize("option", ["label_smoothing", "neftune_alpha", "weight_decay"])
def test_a_setting_of_the_method_changes_what_is_learnt(recipe, tmp_path, option):
    value = 5.0 if option == "neftune_alpha" else 0.3
    plain, other = (
        fine_tune(recipe(out=tmp_path / str(n), max_steps=3, **options))
        for n, options in enumerate(({}, {option: value}))
    )
    assert plain.steps[-1].loss != other.steps[-1].loss


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
