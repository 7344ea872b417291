from __future__ import annotations

import json
import os
import re
import signal
from functools import partial

import peft
import pytest
import torch

import rankfold.train.run
from conftest import tiny_llama
from rankfold import PeftModel, Recipe, fine_tune
from rankfold.data.shapes.sources import Source
from rankfold.errors import DataError, OutputError, TrainingError
from rankfold.models.base import load
from rankfold.train.keeping.listener import Listener
from rankfold.train.run import decide, resume
from rankfold.train.step.pace import Pace

BEGUN = {".lock", "checkpoints", "metrics.jsonl", "recipe.yaml", "run.json"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "rankfold.json"}
FINISHED = BEGUN | ADAPTER | {"report.html"}


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "out": tmp_path / "run", "epochs": 1}
        if "data" not in options:
            settings["data"] = write_rows(joke_rows)
        return Recipe.of(settings | {"learning_rate": 1e-2, "samples": 1, "precision": "float32"} | options)

    return make


class Doing(Listener):
    """Does something after a step, and remembers the stages."""

    def __init__(self, step: int, action) -> None:
        self.step = step
        self.action = action
        self.stages: list[str] = []

    def on_stage(self, stage):
        self.stages.append(stage)

    def on_step(self, record):
        if record.step == self.step:
            self.action()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_leaves_an_adapter_its_numbers_and_its_report(recipe, tmp_path):
    result = fine_tune(recipe())
    assert {path.name for path in result.out.iterdir()} == FINISHED
    assert {path.name for path in tmp_path.iterdir()} == {"run", "rows.jsonl"}
    assert [record.step for record in result.steps] == [1, 2, 3]
    record = json.loads((result.out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["rows"] == {
        "train": 22,
        "held_out": 2,
        "shape": "24 rows of prompt-completion (columns prompt, completion)",
    }
    assert record["steps"] == len((result.out / "metrics.jsonl").read_text().splitlines()) == 3
    assert record["comparison"]["gap"] == pytest.approx(result.comparison.gap)
    assert len(record["samples"]) == len(result.samples) == 1


def test_the_adapter_gives_equal_logits_here_and_in_peft_and_they_are_not_the_bases(recipe):
    out = fine_tune(recipe()).out
    ids = torch.randint(0, 49152, (2, 11))
    ours = PeftModel.from_pretrained(tiny_llama(), out)(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), out).eval()(ids).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, tiny_llama()(ids).logits, atol=1e-6)


def test_the_numbers_are_those_of_peft_on_the_same_rows(recipe):
    """Held-out loss of base and tuned, worked out anew with PEFT and transformers' own loss."""
    from rankfold.data.tokens.encode import encode_all
    from rankfold.train.planning.rows import read_data

    settings = recipe()
    result = fine_tune(settings)
    tokenizer = load.load_base(settings.model).tokenizer
    rows, _ = encode_all(read_data(settings, False).held_out, tokenizer, 512)
    models = [tiny_llama(), peft.PeftModel.from_pretrained(tiny_llama(), result.out).eval()]
    means = []
    for model in models:
        sums = [
            model(input_ids=torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss.item()
            * r.trained_tokens
            for r in rows
        ]
        means.append(sum(sums) / sum(r.trained_tokens for r in rows))
    assert means == pytest.approx([result.comparison.base_loss, result.comparison.tuned_loss], rel=1e-5)


def test_what_the_caller_draws_does_not_depend_on_a_run(recipe):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fine_tune(recipe(dropout=0.2, max_steps=2))
    assert torch.equal(torch.rand(3), wanted)


def test_one_seed_gives_the_same_bytes_and_another_does_not(recipe, tmp_path):
    outs = [fine_tune(recipe(out=tmp_path / f"run{n}", seed=seed)).out for n, seed in enumerate((3, 3, 4))]
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_recomputed_activations_change_no_bit(recipe, tmp_path, precision):
    options = {"precision": precision, "dropout": 0.2, "max_steps": 2}
    kept, recomputed = (
        fine_tune(recipe(out=tmp_path / str(on), activation_checkpointing=on, **options)).out
        for on in (False, True)
    )
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (kept, recomputed)]
    assert weights[0] == weights[1]
    assert "activation_checkpointing: true" in (recomputed / "recipe.yaml").read_text()


def test_ctrl_c_keeps_the_steps_that_are_done(recipe):
    before = signal.getsignal(signal.SIGINT)
    listener = Doing(2, interrupt)
    result = fine_tune(recipe(), listener)
    assert result.interrupted
    assert len(result.steps) == 2
    assert {path.name for path in result.out.iterdir()} == FINISHED - {"report.html"}
    assert json.loads((result.out / "run.json").read_text())["status"] == "interrupted"
    PeftModel.from_pretrained(tiny_llama(), result.out)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(recipe, tmp_path):
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        fine_tune(recipe(), Doing(1, twice))
    assert {path.name for path in (tmp_path / "run").iterdir()} == BEGUN


class Poisoning(Listener):
    """Puts a NaN into the adapter after the first step."""

    def on_plan(self, plan):
        self.model = plan.model

    def on_step(self, record):
        next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = float("nan")


def test_a_run_whose_weights_are_spoilt_saves_none_of_them(recipe, tmp_path):
    with pytest.raises(TrainingError, match=r"step 2 gave loss nan(.|\n)*A lower learning rate"):
        fine_tune(recipe(), Poisoning())
    assert {path.name for path in (tmp_path / "run").iterdir()} == BEGUN
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("file", "message"), [("run.json", "holds a run already"), ("notes.txt", "is not an empty folder")]
)
def test_a_used_output_folder_is_refused_before_anything_is_loaded(
    recipe, tmp_path, monkeypatch, file, message
):
    monkeypatch.setattr(load, "find_base", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("{}")
    with pytest.raises(OutputError, match=message):
        fine_tune(recipe())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_an_empty_output_folder_is_welcome(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    assert (fine_tune(recipe()).out / "run.json").is_file()


def test_bad_rows_are_told_before_a_model_is_loaded(recipe, write_rows, monkeypatch):
    monkeypatch.setattr(load, "find_base", None)
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'completion' is missing"):
        fine_tune(recipe(data=write_rows([{"prompt": "a"}])))


def test_rows_that_are_held_out_too_are_not_trained_on(recipe, write_rows, joke_rows):
    held_out = write_rows(joke_rows[:3], "held_out.jsonl")
    out = fine_tune(recipe(held_out=held_out)).out
    record = json.loads((out / "run.json").read_text())
    assert record["rows"]["train"] == 21
    assert any("3 training rows left out" in note for note in record["notes"])


def test_the_tutorials_text_column_is_trained_and_continued_as_text(recipe, write_rows):
    rows = write_rows([{"jokes": f"Joke number {n} is cold."} for n in range(20)])
    out = fine_tune(recipe(data=rows)).out
    assert json.loads((out / "rankfold.json").read_text())["prompt_style"] == "plain"
    assert load.load_tuned(out).prompt_style == "plain"


def test_the_report_is_one_page_with_nothing_from_elsewhere(recipe, write_rows, joke_rows):
    evil = [{"prompt": "<script>alert(1)</script>", "completion": "<img src=x onerror=alert(1)>"}]
    held_out = write_rows(evil, "<b>held<b>.jsonl")
    result = fine_tune(
        recipe(held_out=held_out, data=write_rows([*joke_rows, {"prompt": "<i>", "completion": "</i>"}]))
    )
    page = (result.out / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    outside = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page))
    assert not outside, outside
    assert f"{result.comparison.base_loss:.4f}" in page
    assert f"{result.comparison.tuned_loss:.4f}" in page
    assert page.count("<svg") == 1


def test_a_run_can_be_limited_in_steps_and_in_minutes(recipe, tmp_path):
    limited = fine_tune(recipe(epochs=3, max_steps=2))
    assert [record.step for record in limited.steps] == [1, 2]
    assert limited.steps[0].steps == 2
    hurried = fine_tune(recipe(epochs=3, max_minutes=1e-9, out=tmp_path / "hurried"))
    assert len(hurried.steps) == 1
    assert not hurried.interrupted
    assert hurried.comparison is not None


class StepClock:
    """A step asks three times what time it is; between the last two of them four seconds pass."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return 4.0 * (self.asked // 3)


@pytest.mark.slow
def test_a_timed_run_ends_its_fall_with_its_time_and_goes_on_exactly(recipe, tmp_path, monkeypatch):
    """6 steps are planned; in 18 seconds there is room for 4.  One run is stopped after 2 of them."""

    def timed(out):
        monkeypatch.setattr(rankfold.train.run, "Pace", partial(Pace, clock=StepClock()))
        options = {"epochs": 2, "rows_per_step": 8, "max_minutes": 0.3, "evaluate_every_steps": 0}
        return recipe(**options, samples=0, out=tmp_path / out)

    whole = fine_tune(timed("whole"))
    rates = [record.learning_rate for record in whole.steps]
    assert len(rates) == 4
    assert rates[-1] < 0.1 * max(rates)
    cut = fine_tune(timed("cut"), Doing(2, interrupt))
    assert cut.interrupted
    timed("cut")
    again = resume(tmp_path / "cut")
    assert [record.learning_rate for record in again.steps] == rates
    assert [record.loss for record in again.steps] == [record.loss for record in whole.steps]


def test_a_listener_can_stop_a_run_which_then_goes_on(recipe, tmp_path):
    class Enough(Listener):
        seen = 0

        def on_step(self, record):
            self.seen += 1

        def wants_stop(self):
            return self.seen == 2

    stopped = fine_tune(recipe(), Enough())
    assert (stopped.interrupted, len(stopped.steps)) == (True, 2)
    assert len(resume(stopped.out).steps) == 3


def test_packed_and_padded_runs_learn_the_same(recipe, tmp_path):
    packed, padded = (
        fine_tune(recipe(out=tmp_path / kind, batching=kind, samples=0)) for kind in ("packed", "padded")
    )
    assert [r.loss for r in packed.steps] == pytest.approx([r.loss for r in padded.steps], rel=1e-4)
    assert packed.comparison.tuned_loss == pytest.approx(padded.comparison.tuned_loss, rel=1e-4)
    assert json.loads((packed.out / "run.json").read_text())["batching"]["kind"] == "packed"


@pytest.mark.parametrize("stored", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_base_held_in_few_bytes_is_trained_on_as_it_is(recipe, tmp_path, stored):
    """The losses are those of the base with its weights rounded so; they come near the plain one's."""
    held, plain = (
        fine_tune(recipe(out=tmp_path / str(kind), stored=kind, samples=0)) for kind in (stored, None)
    )
    assert [r.loss for r in held.steps] == pytest.approx([r.loss for r in plain.steps], rel=1e-3)
    assert held.comparison.base_loss != plain.comparison.base_loss
    assert f"stored: {stored}" in (held.out / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", [str, lambda path: f"{path}:2", lambda path: [Source(path, 2)]])
def test_the_report_calls_the_data_by_their_files_name(recipe, write_rows, joke_rows, name):
    result = fine_tune(recipe(data=name(write_rows(joke_rows)), samples=0))
    assert "rows of rows.jsonl</p>" in (result.out / "report.html").read_text()


def test_what_is_trained_on_is_a_setting(recipe, write_rows):
    turns = [
        {"role": role, "content": word} for role, word in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    rows = write_rows(
        [{"messages": [*turns[:3], {"role": "assistant", "content": f"Yes {n}"}]} for n in range(20)]
    )
    counts = {
        kind: sum(row.trained_tokens for row in decide(recipe(data=rows, train_on=kind), Listener()).train)
        for kind in ("assistant", "last", "all")
    }
    assert counts["last"] < counts["assistant"] < counts["all"]


@pytest.mark.slow
def test_a_number_of_steps_is_what_happens_in_as_many_passes_as_it_takes(recipe):
    plan = decide(recipe(epochs=None, max_steps=40), Listener())
    assert (plan.settings.steps, plan.settings.epochs) == (40, 14)
    assert plan.settings.reasons["epochs"] == (
        "40 steps as given; a pass is 3; beyond 3 passes rows are learnt by heart"
    )
    assert decide(recipe(epochs=None, max_steps=2), Listener()).settings.steps == 2
    assert decide(recipe(epochs=2, max_steps=40), Listener()).settings.steps == 6  # both are named: the less
    assert len(fine_tune(recipe(epochs=None, max_steps=11, evaluate_every_steps=0)).steps) == 11


def test_a_base_that_bitsandbytes_holds_in_8_bits_is_trained(recipe, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    held = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=eight)
    held.save_pretrained(tmp_path / "eight")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "eight")
    result = fine_tune(recipe(model=str(tmp_path / "eight"), max_steps=6, samples=0))
    assert result.comparison.tuned_loss < result.comparison.base_loss
    ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    answers = []
    for kind in (PeftModel, peft.PeftModel):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "eight")
        answers.append(kind.from_pretrained(base, result.out).eval()(ids).logits)
    torch.testing.assert_close(*answers, rtol=1e-2, atol=1e-2)
