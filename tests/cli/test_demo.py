"""``rankfold demo --vision`` as a user meets it; what it does is tested in ``tests/digits``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from rankfold.cli import demo
from rankfold.cli.main import main
from rankfold.digits import lesson as lessons
from rankfold.digits.lesson import Outcome
from rankfold.digits.rows import load_digits, write_rows
from rankfold.judging.held_out import Comparison
from rankfold.train.keeping.listener import RunResult


def text(low: float, high: float) -> Comparison:
    losses = {"base_loss": 3.0, "tuned_loss": 3.0 + (low + high) / 2, "gap": (low + high) / 2}
    counts = {"rows": 44, "trained_tokens": 1081, "rows_improved": 20}
    return Comparison(**counts, **losses, gap_low=low, gap_high=high)


@pytest.fixture
def demonstrated(monkeypatch, capsys, tmp_path):
    """Run the demo with a lesson that has this outcome: status, output, and the lesson."""

    def run(*arguments: str, **outcome) -> tuple[int, str, lessons.Lesson]:
        taught = []

        def teach(lesson, _):
            taught.append(lesson)
            write_rows(load_digits(), {"test": np.arange(2)}, lesson.rows, 32)
            return Outcome(**({"run": RunResult(out=lesson.run, steps=[])} | outcome))

        monkeypatch.setattr(lessons, "teach", teach)
        monkeypatch.setattr(sys, "argv", ["rankfold", "demo", "--vision", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().out, taught[0]

    return run


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "has cost some"), (-0.3, -0.1, "has not got worse"), (-0.1, 0.1, "cannot be told apart")],
)
def test_the_end_tells_accuracy_text_time_and_how_to_go_on(demonstrated, low, high, verdict):
    numbers = {"before": 0.025, "after": 0.95, "digits": 360, "seconds": 431.4, "cpu_seconds": 800.0}
    status, out, lesson = demonstrated(
        **numbers, text=text(low, high), picture=Path("runs/digits/digits.png")
    )
    assert status == 0
    assert "before    2.5% read right (9 of 360)" in out
    assert "after    95.0% read right (342 of 360)" in out
    assert f"{(low + high) / 2:+.4f} nats per token ({low:+.4f} to {high:+.4f})" in out
    assert verdict in out
    assert "all of it took 431 s, and 800 s of CPU time" in out
    assert (
        "generate --adapter runs/digits/run --prompt Digit? --image runs/digits/rows/images/0000.png" in out
    )
    assert lesson.out == demo.DIGITS_OUT


def test_a_run_that_was_stopped_has_its_status_and_tells_no_numbers(demonstrated):
    run = RunResult(out=Path("runs/digits/run"), steps=[], stopped_by=signal.SIGINT)
    status, out, _ = demonstrated(run=run)
    assert status == 130
    assert "read right" not in out


def test_a_second_demo_takes_the_next_folder(demonstrated, tmp_path):
    for name in ("digits", "digits-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    _, _, lesson = demonstrated("--model", "another")
    assert (lesson.out, lesson.language) == (Path("runs/digits-3"), "another")


def test_a_folder_in_use_is_refused_with_status_2(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["rankfold", "demo", "--vision", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "exists and is not an empty folder; name another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
