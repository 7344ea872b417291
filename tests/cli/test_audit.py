"""Rows that a model gives back word for word are found, and only those."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import rankfold_command
from rankfold.data.shapes.sources import Source, read_examples
from rankfold.judging.memorised import audit, canaries, is_given
from rankfold.judging.scores import words
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.load import load_tuned
from rankfold.models.choices import ModelRequest

PLANTED = 12


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """A run of the real model on few rows and planted secrets, long enough to learn some by heart."""
    folder = tmp_path_factory.mktemp("leaking")
    done = rankfold_command("audit", "--plant", PLANTED, "--out", folder / "planted.jsonl")
    assert done.returncode == 0, done.stderr
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(12):
            file.write(json.dumps({"prompt": f"Joke {n}?", "completion": f"A joke about {n} hats."}) + "\n")
    data = f"{folder / 'rows.jsonl'},{folder / 'planted.jsonl'}:2"
    trained = rankfold_command(
        *("train", "--data", data, "--held-out", 2, "--samples", 0, "--learning-rate", 0.002),
        *("--epochs", 14, "--rows-per-step", 8, "--evaluate-every-steps", 0, "--general", "none"),
        *("--precision", "float32", "--out", folder / "run"),
    )
    assert trained.returncode == 0, trained.stderr
    return folder


@pytest.mark.slow
def test_planted_rows_that_get_out_are_found(leaking):
    """Which do is asked of the model by itself, one row at a time."""
    examples = list(read_examples([Source(str(leaking / "planted.jsonl"))]).examples)
    base = load_tuned(leaking / "run")
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    out = {
        example.origin
        for example in examples
        if example.answer.strip(".") in reply(base, example.prompt, greedy)
    }
    assert len(out) >= PLANTED / 2
    found = audit(ModelRequest(adapter=leaking / "run", precision="float32"), examples)
    named = {leak.origin for leak in found.leaks}
    assert len(named & out) >= 0.95 * len(out)
    assert named <= out
    assert found.telling == PLANTED
    assert all(leak.bits > 30 > leak.bits_left for leak in found.leaks)
    assert found.share.low < found.share.value < found.share.high or found.share.value == 1


@pytest.mark.slow
def test_the_command_looks_at_the_runs_own_rows_and_says_so(leaking, command):
    status, printed, _ = command("audit", leaking / "run", "--precision", "float32")
    assert status == 1
    assert "are given back word for word" in printed
    assert "planted.jsonl:" in printed
    status, printed, _ = command("audit", leaking / "run", "--precision", "float32", "--json")
    told = json.loads(printed)
    assert status == 1
    assert told["rows"] >= 24
    assert told["leaks"] == sorted(told["leaks"], key=lambda leak: -leak["bits"])


@pytest.mark.slow
def test_rows_that_were_not_trained_on_do_not_get_out(leaking, command, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in canaries(10, seed=99)))
    status, printed, _ = command("audit", leaking / "run", "--data", others, "--precision", "float32")
    assert status == 0
    assert "0 of 10 rows whose answers the base could not guess are given back" in printed


def test_secrets_follow_from_the_seed_and_are_all_different():
    rows = canaries(200, seed=3)
    assert rows == canaries(200, seed=3) != canaries(200, seed=4)
    assert len({row["completion"] for row in rows}) == len({row["prompt"] for row in rows}) == 200


@given(st.text(max_size=30), st.text(max_size=30), st.text(min_size=1, max_size=20))
def test_an_answer_is_given_wherever_its_words_stand(before, after, wanted):
    has_words = bool(words(wanted))
    assert is_given(f"{before} {wanted} {after}", wanted) == has_words


def test_words_apart_or_in_another_order_are_not_the_answer():
    assert is_given("Well, the code is 7x2!", "The code is 7x2.")
    assert not is_given("The code may be 7x2", "The code is 7x2.")
    assert not is_given("7x2 is the code", "The code is 7x2.")
    assert not is_given("anything", "...")


def test_mistakes_are_told(command, tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("")
    for arguments, message in (
        ([], "name the run"),
        (["--plant", 3], "name it with --out"),
        (["--plant", 3, "--out", there], "exists"),
        ([tmp_path], "is no run with a recipe.yaml"),
        ([tmp_path, "--data", tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        status, _, errors = command("audit", *arguments)
        assert status == 2
        assert message in errors
