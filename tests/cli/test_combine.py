"""``rankfold combine`` as a user meets it."""

from __future__ import annotations

import json

import pytest

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model

ROWS = [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(6)]


@pytest.fixture
def adapters(tiny_folder, tmp_path):
    for seed, name in enumerate(("one", "two"), 1):
        config = LoraConfig(r=seed + 1, target_modules=["q_proj"], base_model_name_or_path=str(tiny_folder))
        model = get_peft_model(tiny_llama(), config)
        randomise(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def test_the_result_is_judged_beside_its_parts_on_rows(adapters, command, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    status, printed, errors = command("combine", *adapters, "--out", tmp_path / "both", "--data", rows)
    assert status == 0, errors
    assert "rank 5; exact" in printed
    for name in ("base", "one", "two", "both"):
        assert name in printed.partition("written")[2]


def test_without_rows_nothing_is_judged(adapters, command, tmp_path):
    status, printed, _ = command("combine", *adapters, "--out", tmp_path / "both")
    assert status == 0
    assert printed.rstrip().endswith(str(tmp_path / "both"))


def test_rows_that_are_not_there_are_a_users_mistake(adapters, command, tmp_path):
    status, _, errors = command(
        "combine", *adapters, "--out", tmp_path / "both", "--data", tmp_path / "no.jsonl"
    )
    assert status == 2
    assert "no.jsonl" in errors
    assert "Traceback" not in errors
