"""The commands of other servers: the rules that they follow are held by tests/export/test_served.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankfold.errors import ConfigError
from rankfold.models.choices import ModelRequest
from rankfold.serve.engines import command_of
from rankfold.serve.request import ServeRequest
from serving import make_adapters


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    return make_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"))


def asked(engine, **options):
    return ServeRequest.of({"engine": engine, "host": "0.0.0.0", "port": 81, "at_once": 7} | options)


def started(tmp_path, adapters, engine, model, key="a secret key", **options):
    return command_of(adapters, ModelRequest(model=str(model)), asked(engine, **options), key, tmp_path)


def after(words, flag):
    return words[words.index(flag) + 1]


def test_vllm_is_told_of_all_adapters_and_of_their_rank(tmp_path, adapters, tiny_folder):
    found = started(tmp_path, adapters, "vllm", tiny_folder)
    words = found.command
    assert words[0] == sys.executable
    assert (after(words, "--model"), after(words, "--host"), after(words, "--port")) == (
        str(tiny_folder),
        "0.0.0.0",
        "81",
    )
    assert (after(words, "--max-lora-rank"), after(words, "--max-loras"), after(words, "--max-num-seqs")) == (
        "8",
        "2",
        "7",
    )
    named = dict(word.split("=", 1) for word in words if word.startswith(("one=", "two=")))
    assert list(named) == ["one", "two"]
    for folder in named.values():
        assert json.loads(Path(folder, "adapter_config.json").read_text())["r"] == 8
    assert "a secret key" not in " ".join(words)
    assert found.environment == {"VLLM_API_KEY": "a secret key"}
    assert started(tmp_path / "b", {}, "vllm", tiny_folder, None).environment == {}


def test_lmdeploy_serves_adapters_by_its_pytorch_backend(tmp_path, adapters, tiny_folder):
    found = started(tmp_path, adapters, "lmdeploy", tiny_folder)
    assert after(found.command, "--backend") == "pytorch"
    assert after(found.command, "--server-port") == "81"
    assert "command line" in found.notes[0]


def test_llama_cpp_takes_a_gguf_file_and_one_adapter(tmp_path, adapters, tiny_folder):
    with pytest.raises(ConfigError, match="reads a GGUF file"):
        started(tmp_path, {}, "llama.cpp", tiny_folder)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    found = started(tmp_path, {}, "llama.cpp", name)
    assert after(found.command, "--model").endswith(".gguf")
    assert found.environment == {"API_KEY": "a secret key"}
    with pytest.raises(ConfigError, match="GGUF file; name a folder"):
        started(tmp_path, {}, "vllm", name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "vllm", "--queue", "3"], "queue: for rankfold's own server"),
        (["--engine", "vllm", "--temperature", "0"], "temperature: clients say so"),
        (["--engine", "vllm", "--stored", "int8"], "stored: vllm has nothing for it"),
        (["--engine", "vllm"], "vllm is not installed here"),
        (["--", "--enforce-eager"], "--enforce-eager: words behind the model"),
        (["--engine", "vllm", "--engine-python", "/nowhere/python"], "no such file"),
    ],
    ids=str,
)
def test_what_an_engine_has_nothing_for_is_told(tiny_folder, words, told, command):
    status, _, problem = command("serve", tiny_folder, *words)
    assert status == 2
    assert told in problem


def test_the_engine_ends_when_this_process_is_told_to(tiny_folder, tmp_path):
    python = tmp_path / "python"  # an environment whose engine is a program that waits
    python.write_text('#!/bin/sh\necho began "$@"\nexec sleep 60\n')
    python.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "rankfold",
        "serve",
        tiny_folder,
        "--engine",
        "vllm",
        "--engine-python",
        python,
        "--",
        "--enforce-eager",
    ]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert any(line.startswith("began -m vllm") and "--enforce-eager" in line for line in lines), lines
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        process.wait(20)
        assert time.monotonic() - started < 10
