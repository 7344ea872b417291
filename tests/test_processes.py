"""Runs in two processes, which meet over gloo as torchrun's do, beside the same run in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import children
from rankfold.errors import ConfigError, OutputError
from rankfold.processes import Processes

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def options(tiny_folder, joke_rows, tmp_path_factory):
    """Two epochs, the last step of each with fewer rows; 9 rows a step, so that shares differ."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in joke_rows))
    return {
        "model": str(tiny_folder),
        "data": data,
        "epochs": 2,
        "rank": 4,
        "rows_per_step": 7,
        "learning_rate": 1e-3,
        "samples": 1,
        "precision": "float32",
        "ema_decay": 0.9,
        "save_every_steps": 1,
    }


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert children.run("fine_tune", options | {"out": out}) == 0
    return out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, wanted: Path) -> None:
    """To rounding: sums are taken in another order."""
    for name in ("loss", "gradient_norm", "trained_tokens", "held_out_loss", "tokens"):
        found, expected = ([m[name] for m in metrics(folder) if m[name]] for folder in (run, wanted))
        assert found == pytest.approx(expected, rel=1e-4), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (run, wanted)]
    assert records[0]["comparison"]["tuned_loss"] == pytest.approx(
        records[1]["comparison"]["tuned_loss"], rel=1e-5
    )
    assert records[0]["status"] == "finished"
    one, other = load_file(run / WEIGHTS), load_file(wanted / WEIGHTS)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-2 * other[name].norm(), name


@pytest.mark.parametrize(
    "shard_base",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["each its own base", "one base cut in two"],
)
def test_two_processes_make_the_same_run_as_one(options, alone, tmp_path, shard_base):
    out = tmp_path / "run"
    assert children.run_together("fine_tune", options | {"out": out, "shard_base": shard_base}, 2) == [0, 0]
    assert_same_run(out, alone)
    files = [{path.name for path in folder.iterdir()} for folder in (out, alone)]
    assert files[0] == files[1]
    config = [json.loads((folder / "adapter_config.json").read_text()) for folder in (out, alone)]
    assert config[0] == config[1]
    facts = [json.loads((folder / "rankfold.json").read_text())["base"] for folder in (out, alone)]
    assert facts[0] == facts[1]


@pytest.mark.slow
def test_a_base_cut_in_two_with_recomputed_activations_makes_the_same_run(options, alone, tmp_path):
    more = {"out": tmp_path / "run", "shard_base": True, "activation_checkpointing": True}
    assert children.run_together("fine_tune", options | more, 2) == [0, 0]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_three_processes_with_fewer_rows_than_processes_in_a_step(options, tmp_path):
    few = options | {"rows_per_step": 2, "epochs": 1, "max_steps": 3}
    assert children.run("fine_tune", few | {"out": tmp_path / "one"}) == 0
    assert children.run_together("fine_tune", few | {"out": tmp_path / "three"}, 3) == [0, 0, 0]
    assert_same_run(tmp_path / "three", tmp_path / "one")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(options, alone, tmp_path, before, after):
    out = tmp_path / "run"
    argument = options | {"out": out, "max_minutes": 1e-9}  # stops after a step; the limit may be changed
    assert children.run_together("fine_tune", argument, before) == [0] * before
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("max_minutes: 1.0e-09\n", ""))
    assert len(metrics(out)) == 1
    assert children.run_together("resume", out, after) == [0] * after
    assert_same_run(out, alone)


def test_a_used_folder_is_refused_in_every_process_and_none_waits_for_another(options, alone):
    assert children.run_together("fine_tune", options | {"out": alone}, 2) == [1, 1]


def test_json_goes_round_and_one_process_is_alone_at_no_cost():
    alone = Processes()
    assert alone.gather({"a": "ä"}) == [{"a": "ä"}]
    assert alone.first_does(lambda: [1]) == [1]
    assert alone.highest(3) == 3
    with pytest.raises(OutputError, match="full"):
        alone.together(fail)


def fail() -> None:
    raise OutputError("full")


def test_deepspeed_is_refused_by_name():
    with pytest.raises(ConfigError, match="DeepSpeed is not supported(.|\n)*shard_base=true"):
        Processes.join({"ACCELERATE_USE_DEEPSPEED": "true"})
