"""What the benchmarks write down, and that both sides are asked for the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import GSM8K, needs_gsm8k
from rankfold.train.step.schedule import learning_rate_at

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def figures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import parts.figures as module

    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "benchmarks.md")
    return module


@pytest.fixture
def sides(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import parts.sides as module

    return module


def test_a_figure_is_the_median_of_its_rounds_with_its_spread(figures):
    figure = figures.Figure(name="a", what="x", unit="s", ratios=[3.0, 1.0, 2.5], at_least=2.0)
    entry = figure.as_json("make bench", "a machine")
    assert (entry["low"], entry["ratio"], entry["high"], entry["reached"]) == (1.0, 2.5, 3.0, True)
    wanted = {"name", "ratio", "low", "high", "unit", "ours", "theirs", "command", "machine", "date"}
    assert wanted <= entry.keys()


@pytest.mark.parametrize(
    ("goal", "reached"), [({"at_most": 1.0}, True), ({"below": 1.0}, False), ({"at_least": 1.1}, False)]
)
def test_a_goal_is_held_to_the_letter(figures, goal, reached):
    assert figures.Figure(name="a", what="x", unit="s", ratios=[1.0], **goal).reached is reached


def test_a_failed_figure_stands_on_the_page_and_in_the_results(figures):
    figures.record([figures.Figure(name="a", what="x", unit="s", failed="no such package", at_least=3.0)])
    [entry] = json.loads(figures.RESULTS.read_text())
    assert (entry["ratio"], entry["reached"], entry["failed"]) == (None, None, "no such package")
    assert "**failed** | no such package" in figures.PAGE.read_text()


def test_a_figure_that_is_not_reached_stands_there_with_what_bounds_it(figures):
    sides = {"what": "x", "unit": "ms a token"}
    goal = figures.Figure(name="rank_64", ratios=[1.5], at_most=1.25, **sides)
    figures.record([goal])
    assert "- `rank_64`: not looked into." in figures.PAGE.read_text()
    figures.record([figures.Figure(name="rank_64_products", ratios=[1.125], **sides)])
    assert "- `rank_64`: the matrix products alone cost 1.12 times as much." in figures.PAGE.read_text()
    figures.record([figures.Figure(name="rank_64", ratios=[1.2], at_most=1.25, **sides)])
    assert "- `rank_64`" not in figures.PAGE.read_text()


def test_a_figure_takes_the_place_of_the_one_measured_before(figures):
    for ratio in (1.0, 2.0):
        for name in ("a", "b"):
            figures.record([figures.Figure(name=name, what="x", unit="s", ratios=[ratio])])
    entries = json.loads(figures.RESULTS.read_text())
    assert [(entry["name"], entry["ratio"]) for entry in entries] == [("a", 2.0), ("b", 2.0)]


def test_the_machine_is_told_without_its_name_or_a_path(figures, monkeypatch, tmp_path):
    import platform

    rows = tmp_path / "rows.jsonl"
    rows.touch()
    monkeypatch.setattr("sys.argv", ["/home/someone/benchmarks/speed.py", str(rows), "--model", "org/name"])
    assert figures.command_line() == "python benchmarks/speed.py rows.jsonl --model org/name"
    assert platform.node() not in figures.machine_line()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_other_side_learns_at_the_rates_of_a_run(sides, schedule, steps):
    warmup = max(1, round(0.05 * steps))
    ours = [learning_rate_at(step, steps, warmup, 1.0, schedule) for step in range(1, steps + 1)]
    theirs = [sides.rate_factor(step, steps, schedule) for step in range(1, steps + 1)]
    assert theirs == pytest.approx(ours)


def test_no_training_row_is_held_out(sides, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(str(number) for number in range(50)) + "\n\n")
    train, held_out = (path.read_text().split() for path in sides.write_rows(data, tmp_path, 40, 10, 0))
    assert (len(train), len(held_out), len({*train, *held_out})) == (40, 10, 50)


def test_a_child_that_fails_says_why(sides, tmp_path):
    with pytest.raises(sides.ChildError, match="roofline ended with status 1: KeyError: 'steps'"):
        sides.run_child("roofline", {}, tmp_path)


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed as module

    return module


def run_of(seconds: float, gigabytes: float = 1.0, trainable: int = 10) -> dict[str, object]:
    """What a side hands back: a first step of 1 s that does not count, and one of 100 tokens."""
    ran = {"tokens": [100, 100], "trained_tokens": [60, 60], "ends": [1.0, 1.0 + seconds]}
    return ran | {"training_bytes": gigabytes * 1e9, "trainable": trainable}


def test_a_ratio_is_of_ours_to_theirs_round_by_round(speed):
    rounds = [{"ours": run_of(1, 2), "peft": run_of(seconds, 8)} for seconds in (3.0, 4.0, 5.0)]
    goals = {goal.name: goal for goal in speed.GOALS}
    faster = speed.figure_of(goals["peft_trainer_dropout_0"], rounds)
    assert (faster.ratios, faster.ours, faster.theirs) == ([3.0, 4.0, 5.0], 100.0, 25.0)
    smaller = speed.figure_of(goals["peft_trainer_dropout_0_memory"], rounds)
    assert (smaller.ratio, smaller.reached) == (0.25, True)


def test_the_roofline_is_one_mean_step(speed):
    goal = next(goal for goal in speed.GOALS if goal.name == "roofline")
    figure = speed.figure_of(goal, [{"ours": run_of(2.0), "roofline": {"tokens": 90.0, "seconds": 0.9}}])
    assert figure.ratio == pytest.approx(0.5)


def test_a_peer_that_trained_something_else_is_no_comparison(speed):
    results = {"ours": run_of(1), "peft": run_of(3, trainable=11)}
    speed.refuse_other_rows(results)
    figure = speed.figure_of(speed.GOALS[0], [results])
    assert figure.failed == "trainable: 11 here, 10 in ours"
    assert figure.ratio is None


@pytest.mark.slow
@needs_gsm8k
def test_the_measurement_for_a_card_runs_without_one(tmp_path):
    """On tiny shapes: every side trains the same rows, and the tests that are for a card pass."""
    out = tmp_path / "gpu.json"
    words = [str(GSM8K), "--out", str(out), "--steps", "2", "--rows", "4"]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told = json.loads(out.read_text())
    assert (told["card"], told["shape"], told["tests"]["status"]) == ("", "tiny", 0)
    assert told["sides"].keys() >= {"ours", "peft_trainer", "trl_packed"}
    assert not any("failed" in side for side in told["sides"].values())
    assert len(told["ratios"]) == 2 * (len(told["sides"]) - 1)
