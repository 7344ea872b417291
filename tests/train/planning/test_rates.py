"""Which of the rates that were tried is taken, and what a probe leaves as it was."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from rankfold import Recipe
from rankfold.errors import ConfigError
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.keeping.listener import Listener
from rankfold.train.planning.plan import make_plan
from rankfold.train.planning.probe import FACTORS, LEAST_STEPS, probed
from rankfold.train.planning.rates import Probe, choose
from rankfold.train.planning.rows import prepare
from rankfold.train.run import fine_tune, resume

COUNTS = torch.full((40,), 10.0, dtype=torch.float64)
USUAL = 4e-4


def losses(**means: float) -> dict[float, torch.Tensor]:
    """Losses of 40 rows of 10 tokens, with the same noise in each rate but for a little of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(40, generator=generator, dtype=torch.float64) * 10
    found = {}
    for name, mean in means.items():
        own = torch.randn(40, generator=generator, dtype=torch.float64) * 0.5
        found[USUAL * float(name.removeprefix("x").replace("_", "."))] = rows + 10 * mean + own
    return found


@pytest.mark.parametrize(
    ("means", "steps", "best", "taken"),
    [
        ({"x0_5": 2.5, "x1": 2.0, "x2": 2.2}, (8, 8), 1, 1),
        ({"x0_5": 2.5, "x1": 2.0, "x2": 1.5, "x4": 1.7}, (8, 8), 2, 2),
        ({"x0_5": 2.5, "x1": 2.0, "x2": 1.995, "x4": 2.4}, (8, 8), 1, 1),  # no more than noise
        ({"x0_5": 2.5, "x1": 2.0, "x4": 1.5}, (8, 32), 4, 2),  # four times the steps, half the rate
        ({"x0_5": 2.5, "x1": 2.0, "x2": 1.5}, (8, 800), 2, 1),  # never below the usual
        ({"x0_25": 1.2, "x0_5": 1.5, "x1": 2.0}, (8, 800), 0.25, 0.25),  # a lower one is taken as it is
    ],
)
def test_only_a_rate_that_is_clearly_better_is_taken(means, steps, best, taken):
    probe = choose(losses(**means), COUNTS, USUAL, steps, 0)
    assert probe.best == pytest.approx(best * USUAL)
    assert probe.chosen == pytest.approx(taken * USUAL, rel=0.02)
    assert ("usual one" in probe.reason) == (best == 1)


def test_rates_that_broke_off_are_passed_over():
    found = {**losses(x0_5=2.5, x1=2.0), 4 * USUAL: "step 3 gave loss nan"}
    probe = choose(found, COUNTS, USUAL, (8, 8), 0)
    assert probe.chosen == USUAL
    assert [each.problem for each in probe.tried] == ["", "", "step 3 gave loss nan"]
    found = {**losses(x0_25=2.6, x0_5=2.5), USUAL: "step 3 gave loss nan"}
    probe = choose(found, COUNTS, USUAL, (8, 8), 0)
    assert probe.chosen == pytest.approx(USUAL / 2)
    assert "broke off" in probe.reason


def test_a_probe_comes_back_from_its_record():
    probe = choose(losses(x0_5=2.5, x1=2.0, x2=1.5), COUNTS, USUAL, (8, 32), 0)
    assert Probe.read(json.loads(json.dumps(asdict(probe)))) == probe


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "data": write_rows(joke_rows), "out": tmp_path / "run"}
        fixed = {"precision": "float32", "rows_per_step": 4, "probe": True, "samples": 0, "general": "none"}
        return Recipe.of(settings | fixed | options)

    return make


def test_a_probe_leaves_the_model_as_it_was_and_looks_at_no_held_out_row(recipe, monkeypatch):
    asked = recipe(epochs=2)
    plan = make_plan(asked, prepare(asked), Precision.of("float32"), Processes())
    before = {name: p.detach().clone() for name, p in plan.model.named_parameters()}
    judged = []

    def watched(model, rows, *rest):
        judged.extend(row.origin for row in rows)
        return torch.zeros(len(rows), dtype=torch.float64)

    monkeypatch.setattr("rankfold.train.planning.probe.row_losses", watched)
    rates: list[float] = []
    found = probed(plan, rates.append)
    assert all(torch.equal(p, before[name]) for name, p in plan.model.named_parameters())
    assert all(p.grad is None for p in plan.model.parameters())
    assert not set(judged) & {row.origin for row in plan.held_out}
    assert set(judged) < {row.origin for row in plan.train}
    assert rates == pytest.approx([factor * plan.settings.learning_rate for factor in FACTORS])
    assert found.probe.steps == LEAST_STEPS


def test_a_run_takes_the_rate_and_tells_it_and_goes_on_with_it(recipe, tmp_path):
    class Stopping(Listener):
        notes: list[str]

        def __init__(self, at: int) -> None:
            self.at, self.steps, self.stages = at, 0, []

        def on_stage(self, stage):
            self.stages.append(stage)

        def on_step(self, record):
            self.steps = record.step

        def wants_stop(self):
            return self.steps >= self.at

    listener = Stopping(at=3)
    fine_tune(recipe(epochs=2), listener)
    tried = [stage for stage in listener.stages if stage.startswith("trying the learning rate")]
    assert len(tried) == len(FACTORS)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["probe"]["tried"]) == len(FACTORS)
    again = Stopping(at=10**9)
    result = resume(tmp_path / "run", listener=again)
    assert not any(stage.startswith("trying") for stage in again.stages)
    assert max(step.learning_rate for step in result.steps) == pytest.approx(record["probe"]["chosen"])
    assert "Learning rates tried" in (tmp_path / "run" / "report.html").read_text()


def test_a_rate_that_is_given_is_not_tried(recipe):
    result = fine_tune(recipe(learning_rate=3e-3, max_steps=2))
    assert "Learning rates tried" not in (result.out / "report.html").read_text()


def test_too_few_rows_to_try_on_are_told(recipe, write_rows):
    rows = write_rows([{"prompt": f"{n}?", "completion": "Yes."} for n in range(5)], "few.jsonl")
    with pytest.raises(ConfigError, match="too few to try rates on"):
        fine_tune(recipe(data=rows, held_out=2))
