"""``rankfold eval`` as a user meets it, on a tiny model, beside the parts that it is made of."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from conftest import randomise, rankfold_command, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.shapes.sources import Source, read_examples
from rankfold.data.tokens.encode import encode_all
from rankfold.judging.losses import row_losses
from rankfold.models.base.load import load_base, load_tuned

NUMBERS = [
    {"question": f"What is {n} and {n}?", "answer": f"That makes {2 * n}. #### {2 * n}"} for n in range(24)
]
LABELS = [{"text": f"Is {n} warm or cold?", "label": ("warm", "cold", "hot")[n % 3]} for n in range(24)]


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished run of the tiny model, which learnt something."""
    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in NUMBERS))
    arguments = ("--model", tiny_folder, "--data", rows, "--out", folder / "run", "--samples", 0)
    finished = rankfold_command(
        "train", *arguments, "--held-out", 6, "--learning-rate", 0.02, "--precision", "float32"
    )
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


@pytest.fixture
def evaluated(command, tmp_path):
    """Evaluate: the exit status, what was printed, and eval.json."""

    def evaluate(*arguments: object):
        out = tmp_path / "evaluation"
        status, printed, errors = command(
            "eval", *arguments, "--out", out, "--max-new-tokens", 6, "--precision", "float32"
        )
        numbers = json.loads((out / "eval.json").read_text()) if out.is_dir() else {}
        return status, printed + errors, numbers

    return evaluate


def test_a_run_is_judged_on_the_rows_that_it_held_out(evaluated, run, tmp_path):
    status, printed, numbers = evaluated(run)
    record = json.loads((run / "run.json").read_text())
    assert status == 0
    assert list(numbers["models"]) == ["base", "run"]
    assert numbers["rows"] == record["comparison"]["rows"] == 6
    for name, loss in (("base", "base_loss"), ("run", "tuned_loss")):
        found = numbers["models"][name]["metrics"]["loss"]["value"]
        assert found == pytest.approx(record["comparison"][loss], rel=1e-5)
    gap = numbers["models"]["run"]["metrics"]["loss"]["gap"]
    assert gap["value"] == pytest.approx(record["comparison"]["gap"], rel=1e-4)
    assert (gap["low"], gap["high"]) == pytest.approx(
        (record["comparison"]["gap_low"], record["comparison"]["gap_high"]), rel=1e-4
    )
    assert numbers["models"]["run"]["metrics"]["loss"]["verdict"] == "better"
    assert "6 of 6 answers end in a number" in printed
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(set(row["models"]) == {"base", "run"} for row in rows)


def test_the_numbers_are_those_of_the_models_by_themselves(evaluated, run, tiny_folder, write_rows):
    data = write_rows(NUMBERS, "others.jsonl")
    _, _, numbers = evaluated(run, "--data", data, "--metrics", "none")
    examples = read_examples([Source(str(data))]).examples
    for name, base in (("base", load_base(str(tiny_folder))), ("run", load_tuned(run))):
        rows, _ = encode_all(examples, base.tokenizer, 512)
        loss = float(row_losses(base.model, rows, 0).sum()) / sum(row.trained_tokens for row in rows)
        metrics = numbers["models"][name]["metrics"]
        assert metrics["loss"]["value"] == pytest.approx(loss, rel=1e-5)
        text = sum(len(f"{row['answer']}".encode()) for row in NUMBERS)
        bits = float(row_losses(base.model, rows, 0).sum()) / torch.tensor(2.0).log() / text
        assert metrics["bits_per_byte"]["value"] == pytest.approx(float(bits), rel=1e-4)
        assert set(metrics) == {"loss", "perplexity", "bits_per_byte"}


def test_answers_are_those_that_predict_gives(evaluated, command, run, write_rows, tmp_path):
    data = write_rows(NUMBERS, "others.jsonl")
    evaluated(run, "--data", data)
    answers = tmp_path / "answers.jsonl"
    command("predict", "--adapter", run, "--data", data, "--out", answers, "--max-new-tokens", 6)
    predicted = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()]
    assert [row["models"]["run"]["answer"] for row in rows] == predicted


def test_rows_that_a_run_was_trained_on_are_told(evaluated, run, write_rows):
    _, printed, numbers = evaluated(run, "--data", write_rows(NUMBERS, "copy.jsonl"), "--metrics", "none")
    assert "18 of the 24 rows are among those that" in printed
    assert any("how well it remembers them" in note for note in numbers["notes"])


def test_labels_are_seen_and_judged_by_likelihood(evaluated, tiny_folder, write_rows):
    status, printed, numbers = evaluated(tiny_folder, "--data", write_rows(LABELS))
    assert status == 0
    assert numbers["kind"] == "labels"
    assert sorted(numbers["labels"]) == ["cold", "hot", "warm"]
    metrics = numbers["models"][tiny_folder.name]["metrics"]
    assert set(metrics) >= {"accuracy", "macro_f1", "choice", "choice_macro_f1"}
    assert 0 < metrics["choice"]["low"] <= metrics["choice"]["value"] <= metrics["choice"]["high"] < 1
    assert "the answers are 3 labels" in printed


def test_rows_may_have_choices_of_their_own(evaluated, tiny_folder, write_rows, tmp_path):
    rows = [
        {"question": f"{n} and 1?", "answer": answer, "choices": [f"{n + 1}", f"{n}", "none"]}
        for n, answer in enumerate(["A", "0", "2", "none", "C"] * 2)
    ]
    rows[2]["answer"] = "3"
    data = write_rows(rows)
    status, printed, numbers = evaluated(tiny_folder, "--data", data, "--choices", "choices")
    assert status == 0, printed
    assert numbers["kind"] == "choices"
    lines = [json.loads(line) for line in (tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()]
    assert [line["wanted"] for line in lines][:5] == ["1", "2", "3", "none", "none"]
    assert all(
        line["models"][tiny_folder.name]["choice"] in row["choices"]
        for line, row in zip(lines, rows, strict=True)
    )


def test_several_adapters_are_compared_with_the_base(evaluated, run, tiny_folder, write_rows, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.base_model.name_or_path = str(tiny_folder)
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path / "other")
    data = write_rows(NUMBERS, "others.jsonl")
    _, printed, numbers = evaluated(run, tmp_path / "other", "--data", data, "--metrics", "f1")
    assert list(numbers["models"]) == ["base", "run", "other"]
    assert numbers["models"]["other"]["metrics"]["loss"]["verdict"] in ("worse", "better", "not told apart")
    assert "run is " in printed
    assert "other is " in printed


def test_an_adapter_without_effect_is_told(evaluated, tiny_folder, write_rows, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path / "fresh")
    _, printed, numbers = evaluated(tmp_path / "fresh", "--data", write_rows(NUMBERS))
    assert "fresh is base to the bit on every row: its adapter has no effect" in printed
    assert numbers["models"]["fresh"]["metrics"]["loss"]["verdict"] == "the same"


def test_a_function_of_the_users_own_judges(evaluated, tiny_folder, write_rows, tmp_path):
    (tmp_path / "own.py").write_text(
        "def length(answer, wanted, row):\n    return len(row['question']) if wanted else 1 / 0\n"
    )
    function = f"{tmp_path / 'own.py'}:length"
    _, _, numbers = evaluated(tiny_folder, "--data", write_rows(NUMBERS), "--function", function)
    found = numbers["models"][tiny_folder.name]["metrics"]["function"]["value"]
    assert found == pytest.approx(sum(len(row["question"]) for row in NUMBERS) / len(NUMBERS))


def test_answers_in_columns_are_judged_without_a_model(evaluated, write_rows, tmp_path):
    rows = [{**row, "theirs": f"It is {2 * n}", "ours": f"It is {n}"} for n, row in enumerate(NUMBERS)]
    status, _, numbers = evaluated("--data", write_rows(rows), "--answered", "theirs,ours")
    assert status == 0
    assert numbers["models"]["theirs"]["metrics"]["number"]["value"] == 1
    ours = numbers["models"]["ours"]["metrics"]["number"]
    assert ours["value"] == pytest.approx(1 / 24)
    assert ours["verdict"] == "worse"
    assert "loss" not in numbers["models"]["ours"]["metrics"]


def test_running_text_has_losses_alone(evaluated, tiny_folder, write_rows):
    data = write_rows([{"text": f"This is a text about {n} things."} for n in range(8)])
    _, printed, numbers = evaluated(tiny_folder, "--data", data)
    assert set(numbers["models"][tiny_folder.name]["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    assert "8 rows are few" in printed


def test_a_row_that_a_model_cannot_read_counts_for_none(evaluated, tiny_folder, write_rows):
    rows = [*NUMBERS, {"question": "long " * 700, "answer": "#### 1"}]
    _, printed, numbers = evaluated(tiny_folder, "--data", write_rows(rows))
    assert numbers["rows"] == 24
    assert "1 rows left out, longer than a model reads" in printed


class Page(HTMLParser):
    """What a page loads, and the names of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.loads += [
            value or "" for name, value in attributes if name in ("src", "href", "onload", "onclick")
        ]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_by_itself_and_escapes_what_rows_say(evaluated, tiny_folder, write_rows, tmp_path):
    rows = [{**row, "question": f"<script>alert({n})</script> & 你好 {n}"} for n, row in enumerate(NUMBERS)]
    evaluated(tiny_folder, "--data", write_rows(rows), "--shown", 2)
    page = Page()
    page.feed((tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8"))
    assert page.loads == []
    assert page.text.count("<script>alert(") == 2
    assert "你好" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "name the rows to judge on: --data FILE"),
        (["--data", "{numbers}"], "nothing to judge: name adapters or models"),
        (
            ["{model}", "--data", "{numbers}", "--metrics", "rogue_l"],
            "no metric 'rogue_l' (did you mean 'rouge_l'?)",
        ),
        (["{model}", "--data", "{numbers}", "--metrics", "pattern"], "the metric pattern needs --pattern"),
        (["{model}", "--data", "{numbers}", "--pattern", "(", "--rows", "0"], "rows: "),
        (["{model}", "--data", "{numbers}", "--pattern", "zzz"], "finds nothing in any answer wanted"),
        (["{model}", "--data", "{numbers}", "--function", "nowhere.py:f"], "wanted FILE.py:NAME"),
        (["{model}", "--data", "{numbers}", "--function", "{here}:nothing"], "has no function 'nothing'"),
        (["{model}", "--data", "{numbers}", "--choices", "answer"], "must hold a list of two or more"),
        (["{model}", "--data", "{numbers}", "--labels", "yes,no"], "answers that are none of the labels"),
        (["{model}", "{model}", "--data", "{numbers}"], "is named twice"),
        (["nowhere/at/all", "--data", "{numbers}", "--metrics", "none"], "no such model folder"),
        (["--data", "{numbers}", "--answered", "missing"], "column 'missing' holds no answers"),
        (["{model}", "--data", "{text}", "--metrics", "exact"], "the rows are running text"),
        (["{model}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told(command, tiny_folder, write_rows, arguments, message):
    places = {
        "model": str(tiny_folder),
        "numbers": str(write_rows(NUMBERS)),
        "text": str(write_rows([{"text": "Some text."}], "text.jsonl")),
        "here": str(Path(__file__)),
    }
    status, printed, errors = command("eval", *(text.format(**places) for text in arguments))
    assert status == 2
    assert message in errors
    assert "Traceback" not in printed + errors


def test_a_function_that_fails_names_the_row(command, tiny_folder, write_rows, tmp_path):
    (tmp_path / "own.py").write_text("def broken(answer, wanted, row):\n    return row['none']\n")
    function = f"{tmp_path / 'own.py'}:broken"
    data = write_rows(NUMBERS)
    status, _, errors = command(
        "eval", tiny_folder, "--data", data, "--function", function, "--max-new-tokens", 2
    )
    assert status == 2
    assert "rows.jsonl:1" in errors
    assert "KeyError" in errors


def test_nothing_is_left_where_a_disk_is_full(command, tiny_folder, write_rows, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankfold.judging.page.render_evaluation", full)
    out = tmp_path / "evaluation"
    given = ("--data", write_rows(NUMBERS), "--metrics", "none", "--out", out)
    status, _, errors = command("eval", tiny_folder, *given)
    assert status == 2
    assert "No space left on device" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
