"""Several runs beside each other: what is told of them, and what is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from jsonschema import validate

from conftest import rankfold_command
from rankfold.errors import ConfigError
from rankfold.train.comparing.run_report import CURVE_POINTS, RunsReport, _curve, report_on
from rankfold.train.keeping.energy import Energy
from rankfold.train.step.loop import StepRecord

# Otherwise the machine's speed of the moment decides, and runs differ in it.
SPEED = ("--micro-batch-tokens", 4096)


@pytest.fixture(scope="module")
def runs(tiny_folder, joke_rows, tmp_path_factory):
    """Three runs on the same rows, of which one has learnt; and one that holds out others."""
    folder = tmp_path_factory.mktemp("runs")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in joke_rows))
    made = {"learnt": ("1e-2", 6), "not": ("1e-9", 6), "others": ("1e-2", 4)}
    for name, (rate, held_out) in made.items():
        given = ("--model", tiny_folder, "--data", rows, "--out", folder / name, "--learning-rate", rate)
        done = rankfold_command(
            "train", *given, "--held-out", held_out, "--epochs", 2, "--samples", 1, *SPEED
        )
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in made}


def test_the_numbers_are_those_of_the_runs(runs):
    report = report_on([runs["learnt"], runs["not"]])
    for run, name in zip(report.runs, ("learnt", "not"), strict=True):
        record = json.loads((runs[name] / "run.json").read_text())
        lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        assert run.name == name
        assert run.held_out.tuned_loss == record["comparison"]["tuned_loss"]
        assert run.forgetting.value == record["learnt"]["forgetting"]["whole"]["rise"]["value"]
        assert run.tokens == sum(line["tokens"] for line in lines)
        assert [point.loss for point in run.curve] == [line["loss"] for line in lines]
    assert report.differing == {"learning_rate": [0.01, 1e-9]}
    assert report.runs[1].remarks[0].startswith("nothing changed: the learning rate")


def test_runs_on_the_same_rows_are_tested_beside_each_other(runs):
    [pair] = report_on([runs["not"], runs["learnt"]]).pairs
    rows = [json.loads((runs[name] / "run.json").read_text())["comparison"] for name in ("not", "learnt")]
    counts = torch.tensor(rows[0]["row_weights"])
    gaps = torch.tensor(rows[1]["tuned_rows"]) - torch.tensor(rows[0]["tuned_rows"])
    assert (pair.first, pair.second, pair.verdict) == ("not", "learnt", "better")
    assert pair.gap.value == pytest.approx(float(gaps.sum() / counts.sum()))
    assert pair.gap.low <= pair.gap.value <= pair.gap.high < 0
    assert pair.chance == pytest.approx(2 / 2**6)


def test_runs_on_other_rows_are_not_tested_and_that_is_said(runs):
    report = report_on([runs["learnt"], runs["others"]])
    assert report.pairs == []
    assert report.notes == ["others is not tested beside learnt: they were judged on other rows"]


def test_a_run_that_is_not_finished_has_what_it_has(runs, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(runs["learnt"], stopped)
    record = json.loads((stopped / "run.json").read_text())
    gone = ("comparison", "learnt", "samples")
    kept = {name: value for name, value in record.items() if name not in gone}
    (stopped / "run.json").write_text(json.dumps(kept | {"status": "interrupted"}))
    report = report_on([runs["not"], stopped])
    assert report.runs[1].status == "interrupted"
    assert report.runs[1].held_out is None
    assert report.notes == ["stopped is not tested beside not: stopped has no losses of the rows held out"]


def test_what_is_written_is_as_its_schema_says(command, runs, tmp_path):
    out = tmp_path / "report"
    status, printed, _ = command("report", runs["learnt"], runs["not"], runs["others"], "--out", out)
    assert status == 0
    written = json.loads((out / "report.json").read_text())
    schema = json.loads(command("schema", "report")[1])
    validate(written, schema)
    assert RunsReport.model_validate(written).runs[0].name == "learnt"
    assert json.loads(command("report", runs["learnt"], "--json")[1])["runs"][0]["name"] == "learnt"
    assert "not is worse than learnt on the same rows held out" in printed
    page = (out / "report.html").read_text()
    assert "Answers side by side" in page
    assert page.count("<svg") == 1


def test_mistakes_are_told(command, runs, tmp_path):
    for arguments, message in (
        ([tmp_path], "holds no run"),
        ([runs["learnt"], runs["learnt"]], "is named twice"),
        ([runs["learnt"], "--out", runs["learnt"]], "holds a run already"),
        ([], "Missing argument"),
    ):
        status, _, errors = command("report", *arguments)
        assert status == 2
        assert message in errors


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    shutil.copytree(runs["learnt"], tmp_path / "learnt")
    names = [run.name for run in report_on([runs["learnt"], tmp_path / "learnt"]).runs]
    assert names == [f"{runs['learnt'].parent.name}/learnt", f"{tmp_path.name}/learnt"]
    with pytest.raises(ConfigError):
        report_on([runs["learnt"], runs["learnt"]])


def test_a_long_curve_is_thinned_and_keeps_its_looks_and_its_end():
    def step(number: int) -> StepRecord:
        look = 1.0 if number == 1999 else None
        fixed = {"steps": 5000, "gradient_norm": 1.0, "learning_rate": 1.0, "trained_tokens": 1, "tokens": 1}
        return StepRecord(step=number, loss=float(number), seconds=1.0, held_out_loss=look, **fixed)

    points = _curve([step(number) for number in range(1, 5001)])
    assert len(points) <= CURVE_POINTS + 2
    assert {1, 1999, 5000} <= {point.step for point in points}


def test_energy_is_the_sum_of_the_packages_and_survives_their_counters_end(tmp_path):
    """Counters as Linux shows them; those of a package's parts are not counted twice."""
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 50), ("intel-rapl:0:0", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    energy = Energy(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("80\n")
    assert energy.joules() == pytest.approx((200 + 30) * 1e-6)
    assert energy.joules() == 0
    assert Energy(tmp_path / "nowhere").joules() is None
