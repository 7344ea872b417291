from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rankfold.errors import ConfigError
from rankfold.settings import CheckedSettings
from rankfold.train.keeping import trackers
from rankfold.train.keeping.trackers import KNOWN, TrackerNames, Trackers, flat, require_trackers

RECIPE = {"rank": 16, "learning_rate": 2e-4, "data": [{"path": "a", "weight": 1.0}], "held_out": None}


class Setting(CheckedSettings):
    trackers: TrackerNames = Field([], description="where to log")


@given(st.lists(st.sampled_from(KNOWN)), st.sampled_from([",", ", ", " , ", ",,"]))
def test_names_are_a_list_or_words_with_commas_and_each_counts_once(names, comma):
    once = list(dict.fromkeys(names))
    assert Setting.of({"trackers": names}).trackers == once
    assert Setting.of({"trackers": comma.join(names)}).trackers == once


def test_an_unknown_tracker_is_an_error_with_the_nearest_name_and_all_of_them():
    with pytest.raises(ConfigError) as told:
        Setting.of({"trackers": "tensorbord,mlflow,7"})
    assert "'tensorbord' (did you mean 'tensorboard'?), '7'" in str(told.value)
    assert all(name in str(told.value) for name in KNOWN)
    with pytest.raises(ConfigError, match="trackers"):
        Setting.of({"trackers": 7})


def test_the_schema_lists_the_names():
    assert Setting.model_json_schema()["properties"]["trackers"]["items"]["enum"] == list(KNOWN)


def test_all_missing_packages_are_told_at_once_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    wanted = "trackers: wandb, mlflow are not installed; run: pip install wandb mlflow"
    with pytest.raises(ConfigError, match=wanted):
        require_trackers(["wandb", "tensorboard", "mlflow"])
    with pytest.raises(ConfigError, match="mlflow is not installed; run: pip install mlflow"):
        Trackers(["mlflow"], tmp_path, RECIPE, print)
    assert not list(tmp_path.iterdir())
    require_trackers(["tensorboard"])


def test_without_names_nothing_is_written(tmp_path):
    none = Trackers([], tmp_path, RECIPE, pytest.fail)
    none.log({"loss": 1.0}, step=1)
    none.close("finished")
    assert not list(tmp_path.iterdir())


def test_a_recipe_becomes_numbers_and_text():
    given = {**RECIPE, "out": Path("runs/a"), "shape": "prompt"}
    assert flat(given) == {
        "rank": 16,
        "learning_rate": 2e-4,
        "data": '[{"path": "a", "weight": 1.0}]',
        "out": '"runs/a"',
        "shape": "prompt",
    }


def tensorboard_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_step_once_though_the_run_was_cut_off_after_its_checkpoint(tmp_path):
    first = Trackers(["tensorboard"], tmp_path, RECIPE, pytest.fail)
    for step in range(1, 6):
        first.log({"loss": 8.0 / step, "tokens": 3}, step)
    first.close("interrupted")
    marks = (tmp_path / "trackers" / "marks.json").read_text()
    resumed = Trackers(["tensorboard"], tmp_path, RECIPE, pytest.fail, step=3)
    for step in range(4, 9):
        resumed.log({"loss": 8.0 / step, "tokens": 3}, step)
    resumed.close("finished")
    resumed.close("failed")
    events = tensorboard_events(tmp_path / "trackers" / "tensorboard")
    assert events["loss"] == [(step, pytest.approx(8.0 / step)) for step in range(1, 9)]
    assert [step for step, _ in events["tokens"]] == list(range(1, 9))
    assert (tmp_path / "trackers" / "marks.json").read_text() == marks
    assert len(list(tmp_path.rglob("hparams.yml"))) == 1


def test_a_new_run_whose_tracker_cannot_start_is_an_error_and_a_resumed_one_goes_on(tmp_path):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "tensorboard").write_text("a file where a folder should be")
    with pytest.raises(
        ConfigError, match=r"cannot start; see to it, or leave them out(.|\n)*- tensorboard: "
    ):
        Trackers(["tensorboard"], tmp_path, RECIPE, pytest.fail)
    notes: list[str] = []
    resumed = Trackers(["tensorboard"], tmp_path, RECIPE, notes.append, step=4)
    resumed.log({"loss": 1.0}, step=5)
    assert len(notes) == 1
    assert notes[0].startswith("going on without the tracker tensorboard: ")


class Failing:
    """A tracker whose network goes away at step 3."""

    tracker = None
    asked: ClassVar[list[bool]] = []

    def start(self) -> None:
        self.asked.append(sys.stdin.isatty())
        assert sys.stdin.read() == ""

    def store_init_configuration(self, values) -> None:
        assert values == flat(RECIPE)

    def log(self, values, step) -> None:
        if step == 3:
            raise ConnectionError("no route to host\nand much more")

    def finish(self) -> None:
        raise TimeoutError


def test_a_tracker_that_fails_is_told_once_and_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._MAKE, "trackio", lambda place: Failing())
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    notes: list[str] = []
    both = Trackers(["trackio", "tensorboard"], tmp_path, RECIPE, notes.append)
    for step in range(1, 6):
        both.log({"loss": float(step)}, step)
    both.close("finished")
    assert notes == ["going on without the tracker trackio, which failed at step 3: no route to host"]
    assert len(tensorboard_events(tmp_path / "trackers" / "tensorboard")["loss"]) == 5
    assert Failing.asked == [False]


def test_a_tracker_that_cannot_be_closed_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._MAKE, "trackio", lambda place: Failing())
    monkeypatch.setattr(trackers, "require_trackers", lambda names: None)
    notes: list[str] = []
    Trackers(["trackio"], tmp_path, RECIPE, notes.append).close("failed")
    assert notes == ["the tracker trackio could not be closed: TimeoutError()"]


def test_damaged_marks_are_one_sentence(tmp_path):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "marks.json").write_text("{")
    with pytest.raises(ConfigError, match=r"marks\.json is damaged"):
        Trackers(["tensorboard"], tmp_path, RECIPE, pytest.fail)


PROGRAM = """
import sys
from pathlib import Path
from rankfold.train.keeping.trackers import Trackers

def fail(note):
    raise SystemExit(note)

name, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tracker = Trackers([name], folder, {"rank": 16, "data": [1]}, fail, step)
for number in range(step + 1, step + 4):
    tracker.log({"loss": 1 / number}, number)
tracker.close("finished" if step else "interrupted")
"""
LOCAL = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "swanlab"])
def test_the_real_tracker_logs_offline_and_goes_on_with_the_same_run(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "SWANLAB_ROOT": str(tmp_path / "swanlab")}
    environment = os.environ | LOCAL | places
    run, marks = tmp_path / "run", []
    run.mkdir()
    for step in ("0", "2"):
        program = [sys.executable, "-c", PROGRAM, name, str(run), step]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        marks.append(json.loads((run / "trackers" / "marks.json").read_text()))
    assert marks[0] == marks[1]
    assert marks[0].keys() == {name}


def test_a_tracker_that_is_not_logged_in_is_an_error_and_no_question(tmp_path):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment["HOME"] = str(tmp_path)  # where a login would be kept
    program = [sys.executable, "-c", PROGRAM, "wandb", str(tmp_path), "0"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "ConfigError: these trackers cannot start" in done.stderr
    assert "wandb: No API key configured" in done.stderr
