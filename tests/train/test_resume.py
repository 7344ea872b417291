"""Interrupted and resumed equals uninterrupted, to the last bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

import children
from rankfold import Recipe, fine_tune
from rankfold.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from rankfold.train.keeping.listener import Listener
from rankfold.train.run import resume

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def options(tiny_folder, joke_rows, tmp_path_factory):
    """Dropout, shuffling, micro-batches of several sizes, two epochs, a checkpoint at every step."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in joke_rows))
    return {
        "model": str(tiny_folder),
        "data": data,
        "epochs": 2,
        "rank": 4,
        "dropout": 0.2,
        "learning_rate": 1e-2,
        "samples": 0,
        "precision": "float32",
        "save_every_steps": 1,
    }


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory) -> tuple[Path, int]:
    """The folder of a run that nothing stopped, and the number of points at which it could have been."""
    folder = tmp_path_factory.mktemp("oracle")
    count = folder / "count"
    assert children.run("fine_tune", options | {"out": folder / "run"}, count_to=count) == 0
    return folder / "run", int(count.read_text())


def outcome(run: Path) -> tuple[bytes, list[float], dict]:
    """Everything that two equal runs share: the adapter's bytes, every step's loss, the comparison."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert [m["step"] for m in metrics] == list(range(1, record["steps"] + 1))
    losses = [(m["loss"], m["gradient_norm"]) for m in metrics]
    return (run / WEIGHTS).read_bytes(), losses, record["comparison"]


def finish(options: dict, out: Path) -> None:
    """What a user does after a kill: go on if there is a run, else begin again."""
    code = children.run("resume", out) if out.exists() else children.run("fine_tune", options | {"out": out})
    assert code == 0


def killed_and_resumed(options: dict, out: Path, point: int) -> None:
    assert children.run("fine_tune", options | {"out": out}, kill_at=point) == children.KILLED
    if out.exists() and json.loads((out / "run.json").read_text())["status"] == "finished":
        return
    finish(options, out)


def enumerated(points: int, every: int) -> range:
    return range(1 + points % every, points + 1, every)


def test_a_kill_at_any_point_and_a_resume_change_no_bit(options, uninterrupted, tmp_path):
    """A sample of the points; the slow test below takes every one."""
    oracle, points = uninterrupted
    for point in enumerated(points, every=points // 3):
        out = tmp_path / str(point)
        killed_and_resumed(options, out, point)
        assert outcome(out) == outcome(oracle), f"killed at point {point} of {points}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_at_every_single_point_changes_no_bit(options, uninterrupted, tmp_path):
    oracle, points = uninterrupted
    for point in range(1, points + 1):
        out = tmp_path / str(point)
        killed_and_resumed(options, out, point)
        assert outcome(out) == outcome(oracle), f"killed at point {point} of {points}"
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_at_random_moments_change_no_bit(options, uninterrupted, tmp_path, capsys):
    """Runs are killed again and again while they resume, until one gets through."""
    oracle, _ = uninterrupted
    draw = random.Random(0)
    kills = runs = differences = 0
    while kills < 200:
        out = tmp_path / str(runs)
        while not out.exists() or json.loads((out / "run.json").read_text())["status"] != "finished":
            call = ("resume", out) if out.exists() else ("fine_tune", options | {"out": out})
            process = children.start(*call)
            process.join(draw.uniform(0.2, 3.0))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            assert process.exitcode in (0, children.KILLED)
        differences += outcome(out) != outcome(oracle)
        shutil.rmtree(out)
        runs += 1
    with capsys.disabled():
        print(f"\n{kills} kills, {runs} runs resumed to their end, {differences} of them differ")
    assert differences == 0


class Stop(Listener):
    """Asks the run to stop after a step, as Ctrl-C or a scheduler does."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number, self.notes = step, number, []

    def on_step(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), self.number)

    def on_note(self, note):
        self.notes.append(note)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_stopped_between_checkpoints_goes_on_where_it_was(options, tmp_path, number):
    whole = fine_tune(Recipe.of(options | {"out": tmp_path / "whole"}))
    out = tmp_path / "stopped"
    stopped = fine_tune(Recipe.of(options | {"out": out, "save_every_steps": 100}), Stop(2, number))
    assert stopped.stopped_by == number
    assert len(stopped.steps) == 2
    listener = Stop(0)
    result = resume(out, listener=listener)
    assert listener.notes == [f"going on after step 2 of {whole.steps[-1].step}"]
    assert outcome(out) == outcome(tmp_path / "whole")
    assert [record.loss for record in result.steps] == [record.loss for record in whole.steps]


@pytest.fixture
def stopped(options, tmp_path):
    """A run that was stopped after its third step, with checkpoints of the second and third."""
    out = tmp_path / "run"
    fine_tune(Recipe.of(options | {"out": out}), Stop(3))
    return out


def test_a_damaged_checkpoint_is_passed_over_and_said(stopped, options, uninterrupted):
    path = stopped / "checkpoints" / "step-00000003" / "optimiser.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    listener = Stop(0)
    resume(stopped, listener=listener)
    assert "step-00000003: optimiser.safetensors is damaged" in listener.notes[0]
    assert "going on after step 2" in listener.notes[1]
    metrics = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert metrics == sorted(set(metrics))


def test_changed_rows_are_refused(stopped, options):
    rows = options["data"].read_bytes()
    options["data"].write_bytes(rows.replace(b"a", b"e", 1))
    try:
        with pytest.raises(CheckpointError, match="rows .* have changed"):
            resume(stopped)
    finally:
        options["data"].write_bytes(rows)
    assert json.loads((stopped / "run.json").read_text())["status"] == "interrupted"


def test_another_base_of_the_same_shape_is_refused(stopped, options, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = Path(options["model"]) / "model.safetensors"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    try:
        with pytest.raises(CheckpointError, match="the base model is another one"):
            resume(stopped)
    finally:
        weights.write_bytes(kept)


def test_changes_that_make_another_run_are_refused_all_at_once(stopped):
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1(.|\n)*") as raised:
        resume(stopped, {"seed": 1, "rank": "8", "samples": 1})
    assert "rank: 4 -> 8" in str(raised.value)
    assert "  - samples" not in str(raised.value)


def test_a_change_of_how_often_is_saved_is_welcome(stopped):
    resume(stopped, {"keep_checkpoints": "1"})
    assert len(list((stopped / "checkpoints").iterdir())) == 1


def test_a_finished_run_is_not_resumed(stopped):
    resume(stopped)
    with pytest.raises(CheckpointError, match="is finished"):
        resume(stopped)


@pytest.mark.parametrize("content", [None, "[]", "{", "[" * 100_000])
def test_a_folder_that_holds_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="run"):
        resume(tmp_path)


def test_two_processes_never_work_in_one_folder(options, tmp_path):
    out = tmp_path / "run"
    process = children.start("fine_tune", options | {"out": out, "epochs": 1000})
    try:
        while not list(out.glob("checkpoints/step-*")):
            assert process.is_alive()
            time.sleep(0.05)
        with pytest.raises(OutputError, match=f"process {process.pid} is training in"):
            resume(out)
    finally:
        process.kill()
        process.join()


def test_a_batch_that_is_not_finite_keeps_the_state_before_it(options, tmp_path):
    class Poison(Listener):
        def on_plan(self, plan):
            layer = plan.model.get_base_model().model.layers[0].mlp.up_proj
            self.poison = False
            layer.register_forward_hook(
                lambda _m, _i, output: output * (float("nan") if self.poison else 1.0)
            )

        def on_step(self, record):
            self.poison = record.step == 2

    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"step 3 gave loss nan(.|\n)*rows.jsonl:"):
        fine_tune(Recipe.of(options | {"out": out, "save_every_steps": 100}), Poison())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    resume(out)
    fine_tune(Recipe.of(options | {"out": tmp_path / "whole"}))
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_the_recipe_in_the_folder_makes_the_same_run_again(stopped, tmp_path):
    resume(stopped)
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    again = fine_tune(Recipe.of(recipe | {"out": tmp_path / "again"}))
    assert outcome(again.out) == outcome(stopped)


def test_missing_data_is_told_before_anything_is_touched(stopped, options):
    moved = options["data"].rename(options["data"].with_suffix(".away"))
    try:
        with pytest.raises(DataError, match="no such data file"):
            resume(stopped)
    finally:
        moved.rename(options["data"])


def test_a_held_out_row_longer_than_the_training_rows_does_not_keep_a_run_from_going_on(options, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "And now?", "completion": "word " * 200}) + "\n")
    out = tmp_path / "run"
    fine_tune(Recipe.of(options | {"out": out, "held_out": held_out}), Stop(1))
    assert resume(out).comparison.trained_tokens > 200
