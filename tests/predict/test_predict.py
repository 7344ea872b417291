"""A file answered by the command, and by what its parts promise."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from openpyxl import load_workbook

from children import Command
from conftest import rankfold_command, tiny_llama
from image_bases import noise
from rankfold import load_base
from rankfold.digits.assemble import Tower, assemble
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling

QUESTIONS = [f"Question {n}: what is {n} and {n * 7}?{' And why?' * (n % 4)}" for n in range(30)]
GREEDY = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture
def questions(write_rows):
    return write_rows([{"id": n, "question": text} for n, text in enumerate(QUESTIONS)])


@pytest.fixture(scope="module")
def expected(tiny_folder):
    base = load_base(str(tiny_folder))
    return [reply(base, [{"role": "user", "content": text}], GREEDY) for text in QUESTIONS]


@pytest.fixture
def predicted(command, tiny_folder, tmp_path):
    """Answer a file with the tiny model: the exit status, what was printed, and the file of the answers."""

    def run(data, name="answers.jsonl", *more):
        out = tmp_path / name
        given = ("--data", data, "--out", out, "--model", tiny_folder, "--max-new-tokens", 6, *more)
        status, printed, errors = command("predict", *given)
        return status, printed + errors, out

    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_keeps_its_columns_and_gets_its_answer(predicted, questions, expected):
    status, printed, out = predicted(questions)
    rows = rows_of(out)
    assert status == 0
    assert [row["prediction"] for row in rows] == expected
    assert [(row["id"], row["question"]) for row in rows] == list(enumerate(QUESTIONS))
    assert {row["prediction_tokens"] for row in rows} <= set(range(1, 7))
    assert all(row["prediction_finish_reason"] in ("stop", "length") for row in rows)
    assert "30 answers to 30 rows" in printed
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("at_once", [1, 7])
def test_the_answers_are_the_same_however_many_are_given_at_once(predicted, questions, expected, at_once):
    status, _, out = predicted(questions, "answers.jsonl", "--at-once", at_once)
    assert (status, [row["prediction"] for row in rows_of(out)]) == (0, expected)


def test_what_is_drawn_does_not_hang_on_what_stands_beside_it(predicted, questions, write_rows):
    drawn = ("--temperature", 1.2, "--seed", 5)
    first = rows_of(predicted(questions, "one.jsonl", *drawn, "--at-once", 3)[2])
    order = random.Random(0).sample(range(30), 30)
    shuffled = write_rows([{"id": n, "question": QUESTIONS[n]} for n in order], "shuffled.jsonl")
    second = rows_of(predicted(shuffled, "two.jsonl", *drawn, "--at-once", 11)[2])
    assert {row["id"]: row["prediction"] for row in first} == {row["id"]: row["prediction"] for row in second}
    other = rows_of(predicted(questions, "three.jsonl", "--temperature", 1.2, "--seed", 6)[2])
    assert [row["prediction"] for row in other] != [row["prediction"] for row in first]


def test_each_row_may_have_several_answers(predicted, questions):
    _, _, out = predicted(questions, "answers.jsonl", "--samples", 3, "--temperature", 1.5)
    rows = rows_of(out)
    assert [(row["id"], row["prediction_sample"]) for row in rows] == [
        (n, s) for n in range(30) for s in range(3)
    ]
    assert any(rows[3 * n]["prediction"] != rows[3 * n + 1]["prediction"] for n in range(30))


def test_a_bad_row_tells_its_problem_and_the_others_are_answered(predicted, tmp_path, expected):
    rows = [json.dumps({"question": text}) for text in QUESTIONS[:4]]
    rows[1:1] = ['{"question": ""}', '{"cut', '{"question": "Look", "video": "a.mp4"}']
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(rows) + "\n")
    status, printed, out = predicted(data)
    found = rows_of(out)
    assert status == 1
    assert [row["prediction"] for row in found] == [expected[0], None, None, None, *expected[1:4]]
    problems = [row["prediction_problem"] for row in found]
    assert problems[1] == "the question is empty"
    assert "Unterminated" in problems[2]
    assert "'video' holds media" in problems[3]
    assert "bad.jsonl:2: the question is empty" in printed


def test_a_prompt_longer_than_the_model_reads_is_refused_for_its_row(predicted, write_rows, expected):
    data = write_rows([{"question": "word " * 600}, {"question": QUESTIONS[0]}])
    status, _, out = predicted(data)
    long, short = rows_of(out)
    assert (status, short["prediction"]) == (1, expected[0])
    assert "the model reads up to 512" in long["prediction_problem"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.xlsx", "a.parquet"])
def test_answers_are_written_in_the_format_of_the_name(predicted, write_rows, expected, name):
    data = write_rows(
        [{"question": QUESTIONS[0], "note": "=1+1", "more": {"a": [1, 2]}}, {"question": QUESTIONS[1]}]
    )
    status, _, out = predicted(data, name)
    kind = out.suffix
    if kind in (".csv", ".tsv"):
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
    elif kind == ".xlsx":
        heading, *cells = load_workbook(out).active.iter_rows(values_only=True)
        rows = [dict(zip(heading, values, strict=True)) for values in cells]
    elif kind == ".parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    else:
        rows = json.loads(out.read_text()) if kind == ".json" else rows_of(out)
    assert status == 0
    assert [row["prediction"] for row in rows] == expected[:2]
    assert rows[0]["note"] == "=1+1"
    more = rows[0]["more"]
    assert (json.loads(more) if isinstance(more, str) else more) == {"a": [1, 2]}
    again = predicted(out, f"again-{name}", "--column", "again", "--shape", "prompt=question")
    assert again[0] == 0  # what was written is read


def test_rows_with_images_are_answered(command, tiny_folder, tmp_path):
    tower = Tower(width=16, layers=1, heads=2, patch_side=8)
    assemble(load_base(str(tiny_folder)), tower, tmp_path / "internvl", seed=0)
    noise(tmp_path / "a.png", 40, 40)
    rows = [
        {"question": "What?", "image": "a.png"},
        {"question": "Who?"},
        {"question": "Gone", "image": "b.png"},
    ]
    data, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = ("--data", data, "--out", out, "--model", tmp_path / "internvl", "--max-new-tokens", 4)
    status, _, _ = command("predict", *given)
    seen, plain, gone = rows_of(out)
    assert status == 1
    assert seen["prediction_prompt_tokens"] > plain["prediction_prompt_tokens"]
    assert seen["prediction_finish_reason"] in ("stop", "length")
    assert "no such image" in gone["prediction_problem"]


def test_several_equal_answers_are_told(predicted, questions):
    _, printed, out = predicted(questions, "answers.jsonl", "--samples", 2, "--temperature", 0)
    assert "note: temperature 0 gives a row the same answer 2 times" in printed
    rows = rows_of(out)
    assert all(rows[n]["prediction"] == rows[n + 1]["prediction"] for n in range(0, 60, 2))


def test_a_stop_text_ends_an_answer(command, real_base, write_rows, tmp_path):
    data = write_rows([{"question": "Count from one to nine in digits, with commas."}])
    out = tmp_path / "a.jsonl"
    given = ("predict", "--data", data, "--out", out, "--max-new-tokens", 30, "--logprobs")
    assert command(*given)[0] == 0
    [whole] = rows_of(out)
    stop = whole["prediction"][4:7]
    cut = tmp_path / "b.jsonl"
    assert command(*(cut if each == out else each for each in given), "--stop", stop)[0] == 0
    [row] = rows_of(cut)
    assert row["prediction"] == whole["prediction"][: whole["prediction"].index(stop)].strip()
    assert row["prediction_finish_reason"] == "stop"
    assert len(row["prediction_logprobs"]) == row["prediction_tokens"] < whole["prediction_tokens"]


def test_what_cannot_be_meant_is_told_before_a_model_is_loaded(command, questions, tmp_path, write_rows):
    def told(*given):
        status, _, errors = command("predict", "--model", "no/such", *given)
        assert status == 2
        return errors

    out = tmp_path / "a.jsonl"
    assert "must end in one of" in told("--data", questions, "--out", tmp_path / "a.txt")
    assert "out is the file of the rows" in told("--data", questions, "--out", questions)
    assert "no such data file" in told("--data", tmp_path / "none.jsonl", "--out", out)
    no_question = write_rows([{"a": 1, "b": 2}] * 2, "none.jsonl")
    assert "no row of" in told("--data", no_question, "--out", out)
    assert "already; name another --column" in told("--data", questions, "--out", out, "--column", "id")
    out.write_text("mine")
    assert "exists; name another --out" in told("--data", questions, "--out", out)
    assert out.read_text() == "mine"


def test_a_killed_run_goes_on_and_no_row_is_lost_or_answered_twice(write_rows, tmp_path):
    folder = tmp_path / "slow"
    tiny_llama().save_pretrained(folder)
    load_base("HuggingFaceTB/SmolLM2-135M-Instruct").tokenizer.save_pretrained(folder)
    data = write_rows([{"question": text} for text in QUESTIONS * 5])
    out, journal = tmp_path / "a.jsonl", tmp_path / ".a.jsonl.answers.jsonl"
    given = ["predict", "--data", data, "--model", folder]
    given += ["--max-new-tokens", "60", "--at-once", "4"]
    killed = 0
    for after in (10, 60):
        process = Command(*given, "--out", out)
        while process.returncode is None and not (
            journal.exists() and journal.read_bytes().count(b"\n") >= after
        ):
            time.sleep(0.01)
        killed += process.returncode is None
        process.send_signal(signal.SIGKILL)
        process.finish()
        assert not out.exists()
    assert killed == 2
    with journal.open("ab") as file:
        file.write(b'{"row": 149, "sam')  # as a kill in the middle of a line leaves it
    before = journal.read_bytes().count(b"\n") - 1
    last = rankfold_command(*given, "--out", out)
    assert last.returncode == 0, last.stderr
    assert f"{before} of 150 answers are there; going on" in last.stdout
    assert f"{150 - before} of them now" in last.stdout
    assert rankfold_command(*given, "--out", tmp_path / "b.jsonl").returncode == 0
    assert out.read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert not journal.exists()


def test_answers_given_otherwise_are_not_gone_on_with(predicted, questions, tmp_path, monkeypatch):
    from rankfold.predict import run

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_write", dies)
    status, _, _ = predicted(questions)
    assert status == 130
    monkeypatch.undo()
    status, printed, _ = predicted(questions, "answers.jsonl", "--temperature", 1)
    assert status == 2
    assert "they were given otherwise" in printed
    assert "sampling" in printed
    lines = questions.read_text().splitlines()
    questions.write_text("\n".join([*lines[:3], lines[3].replace("Question", "Riddle"), *lines[4:]]) + "\n")
    status, printed, _ = predicted(questions)
    assert status == 2
    assert "row 4 of the data is not what it was" in printed
    questions.write_text("\n".join(lines) + "\n")
    status, printed, _ = predicted(questions)
    assert status == 0
    assert "30 of 30 answers are there" in printed


def test_two_runs_do_not_write_into_one_file(predicted, questions, tmp_path):
    from rankfold.predict.journal import Journal

    with Journal(tmp_path / "answers.jsonl", {"a": 1}, 30, 1).opened():
        status, printed, _ = predicted(questions)
    assert status == 2
    assert "another process is answering into" in printed


def test_a_base_in_few_bytes_answers_a_file_too(predicted, questions, tiny_folder):
    status, printed, out = predicted(questions, "held.jsonl", "--stored", "int8")
    assert status == 0, printed
    base = load_base(str(tiny_folder), stored="int8")
    for row in rows_of(out):
        assert row["prediction"] == reply(base, [{"role": "user", "content": row["question"]}], GREEDY)
