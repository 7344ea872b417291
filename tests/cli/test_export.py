"""``rankfold export``"""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from conftest import randomise
from rankfold import LoraConfig, get_peft_model


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_prints_what_was_certified_and_exits_with_2_for_a_mistake(command, adapter, tmp_path):
    words = ("--to", "merged", "--out", tmp_path / "out", "--prompts", "2")
    status, printed, _ = command("export", adapter, *words)
    assert status == 0
    assert "prompts as the same tokens   2 of 2" in printed
    assert printed.splitlines()[-1] == f"written  {tmp_path / 'out'}"
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["holds"] is True
    status, _, told = command("export", adapter, "--to", "onnx", "--out", tmp_path / "other")
    assert status == 2
    assert "to" in told
    assert not (tmp_path / "other").exists()
