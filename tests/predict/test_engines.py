"""Engines that answer in our place.  Those that run here need an environment of their own, which
``make engines`` makes: RANKFOLD_LLAMA_PYTHON and RANKFOLD_VLLM_PYTHON name its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rankfold import LoraConfig, get_peft_model, load_base
from rankfold.errors import AdapterError
from rankfold.models.gguf.adapter import write_gguf_adapter
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tensors import rows_in_pairs, rows_of_pairs
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.predict.engine_worker import groups
from rankfold.predict.engines import _end

LLAMA, VLLM = os.environ.get("RANKFOLD_LLAMA_PYTHON"), os.environ.get("RANKFOLD_VLLM_PYTHON")
QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is 2 and 3?", "Say hello."]


@pytest.fixture
def questions(write_rows):
    return write_rows([{"question": text} for text in QUESTIONS])


def adapted(base, **options):
    """With an adapter that changes every answer."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.15)
    return model


def test_an_engine_that_is_not_there_is_told(command, questions, tmp_path):
    given = ("--data", questions, "--out", tmp_path / "a.jsonl", "--engine", "llama.cpp")
    status, _, errors = command("predict", *given, "--engine-python", sys.executable)
    assert status == 2
    assert "the engine's process ended" in errors
    assert "No module named 'llama_cpp'" in errors


@pytest.mark.parametrize(
    ("engine", "more", "told"),
    [
        ("vllm", (), "vLLM reads a model's folder"),
        ("llama.cpp", ("--logprobs",), "logprobs: llama.cpp has nothing for it"),
        ("llama.cpp", ("--stored", "gguf"), "stored: llama.cpp has nothing for it"),
        ("llama.cpp", ("--precision", "bfloat16"), "precision: llama.cpp has nothing for it"),
        ("llama.cpp", ("--generation-config",), "generation_config: llama.cpp has nothing for it"),
    ],
)
def test_what_an_engine_cannot_do_is_told(command, questions, tmp_path, engine, more, told):
    given = ("--data", questions, "--out", tmp_path / "a.jsonl", "--engine", engine, *more)
    status, _, errors = command("predict", *given)
    assert (status, told in errors) == (2, True), errors


def test_llama_cpp_wants_a_gguf_file(command, questions, tmp_path, tiny_folder):
    given = ("--data", questions, "--out", tmp_path / "a.jsonl", "--engine", "llama.cpp")
    status, _, errors = command("predict", *given, "--model", tiny_folder)
    assert status == 2
    assert "llama.cpp reads a GGUF file" in errors


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}])
def test_an_adapter_that_llama_cpp_has_no_place_for_is_refused(fresh_base, tmp_path, options):
    model = adapted(fresh_base, **options)
    with pytest.raises(AdapterError, match="no place for all of this adapter"):
        tensors = read_gguf(fresh_base.source.gguf_file, words=False).tensors
        write_gguf_adapter(model, "llama", tensors, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_rows_are_put_back_into_the_order_that_they_were_read_from():
    rows = torch.randn(48, 5).numpy()
    assert (rows_in_pairs(rows_of_pairs(rows, 4), 4) == rows).all()
    assert (rows_of_pairs(rows_in_pairs(rows, 4), 4) == rows).all()


def test_a_worker_is_asked_group_by_group():
    lines = ['{"number": 1}\n', '{"number": 2}\n', "\n", "\n", '{"number": 3}\n', "\n", '{"number": 4}\n']
    assert [[each["number"] for each in group] for group in groups(lines)] == [[1, 2], [], [3]]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes here")
def test_what_an_engine_has_started_ends_with_it():
    start = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", start], **pipes, start_new_session=True)
    child = int(process.stdout.readline())
    _end(process)
    assert process.returncode == 0  # it ended by itself
    for _ in range(100):
        if not _runs(child):
            return
        time.sleep(0.1)
    raise AssertionError("the process that it started still runs")


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def predicted(command, tmp_path, questions, engine, python, *more):
    found = []
    for name in ("own", engine):
        out = tmp_path / f"{name}.jsonl"
        given = ["--data", questions, "--out", out, "--max-new-tokens", 12, "--engine", name, *more]
        status, _, errors = command("predict", *given, "--engine-python", python)
        assert status == 0, errors
        found.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
    assert f"{engine} answers; of the engine's first 3 answers so many tokens are our own" in errors
    return found


def behind(base, question, answer):
    """How much less likely than the likeliest token one of ``answer`` is to ``base`` at most, in nats."""
    prompt = prompt_encoder(base.tokenizer).prompt_ids([{"role": "user", "content": question}])
    said = base.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    assert len(said) > 2
    return float((logits.max(dim=-1).values - logits[torch.arange(len(said)), said]).max())


@pytest.mark.skipif(not LLAMA, reason="llama.cpp is not there; make engines")
@pytest.mark.parametrize("tuned", [False, True])
def test_llama_cpp_answers_as_we_do(command, questions, tmp_path, fresh_base, tuned):
    more, untuned = [], load_base(fresh_base.source.name) if tuned else None
    if tuned:
        adapted(fresh_base, rank_pattern={"q_proj": 4}, lora_alpha=12).save_pretrained(tmp_path / "adapter")
        more = ["--adapter", tmp_path / "adapter"]
    _, its = predicted(command, tmp_path, questions, "llama.cpp", LLAMA, *more)
    for question, answer in zip(QUESTIONS, its, strict=True):
        assert behind(fresh_base, question, answer) < 1  # nats: it rounds to 8 bits inside
    if tuned:
        assert (
            max(behind(untuned, question, answer) for question, answer in zip(QUESTIONS, its, strict=True))
            > 2
        )


@pytest.mark.skipif(not VLLM, reason="vLLM is not there; name its interpreter in RANKFOLD_VLLM_PYTHON")
@pytest.mark.parametrize("tuned", [False, True])
def test_vllm_answers_as_we_do(command, questions, tmp_path, fresh_base, tuned):
    folder, more = tmp_path / "model", []
    fresh_base.model.save_pretrained(folder)
    fresh_base.tokenizer.save_pretrained(folder)
    if tuned:
        base = load_base(str(folder))
        adapted(base).save_pretrained(tmp_path / "adapter")
        more = ["--adapter", tmp_path / "adapter"]
    own, its = predicted(command, tmp_path, questions, "vllm", VLLM, "--model", folder, *more)
    assert own == its
