from __future__ import annotations

import json

import pytest

from rankfold.errors import CheckpointError, OutputError
from rankfold.train.keeping.folder import RunFolder
from rankfold.train.step.loop import StepRecord


def step(number: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=number,
        steps=9,
        loss=loss,
        gradient_norm=0.1,
        learning_rate=1e-3,
        trained_tokens=5,
        tokens=9,
        seconds=0.5,
    )


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"data": "字.jsonl", "rank": 8}, {"status": "running"})


def test_a_new_folder_holds_its_recipe_and_record(folder):
    assert folder.recipe_path.read_text() == "data: 字.jsonl\nrank: 8\n"
    assert folder.record() == {"status": "running"}


def test_metrics_come_back_and_those_after_a_checkpoint_are_cut(folder):
    for number in (1, 2, 3):
        folder.add_metrics(step(number))
    folder.cut_metrics(2)
    assert folder.metrics() == [step(1), step(2)]
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_line_that_a_kill_cut_short_is_left_out(folder):
    folder.add_metrics(step(1))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    folder.cut_metrics(9)
    assert folder.metrics() == [step(1)]


def test_a_step_that_was_done_twice_counts_once_the_later_time(folder):
    folder.add_metrics(step(1, loss=2.0))
    folder.add_metrics(step(1, loss=3.0))
    folder.cut_metrics(1)
    assert folder.metrics() == [step(1, loss=3.0)]


def test_a_held_folder_is_refused_naming_its_holder(folder):
    import os

    with (
        folder.locked(),
        pytest.raises(OutputError, match=f"process {os.getpid()} is training in"),
        RunFolder(folder.path).locked(),
    ):
        pass
    with folder.locked():
        pass


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_record_that_is_none_is_told(folder, content):
    (folder.path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="run.json"):
        folder.record()
