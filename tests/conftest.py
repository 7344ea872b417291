"""Shared fixtures: a tiny model that runs in milliseconds, and the real one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from children import Command
from compatibility import Writer
from rankfold.data.tokens.encode import EncodedRow
from rankfold.kernels import forms
from rankfold.models.base.base import Base
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.load import load_base

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network

# Real rows that are not part of the project: a clone alone has none, and skips what needs them.
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not beside this clone")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-compatibility", action="store_true", help="write docs/peft-compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-compatibility"):
        config.pluginmanager.register(Writer())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--write-compatibility"):
        items[:] = [item for item in items if item.get_closest_marker("peft")]


@pytest.fixture(autouse=True)
def torch_computes_until_a_test_says_otherwise() -> None:
    """A run of an earlier test may have let Numba compute in this process."""
    forms._table.clear()


@pytest.fixture(scope="session")
def real_base() -> Base:
    """SmolLM2-135M-Instruct.  Treat as read-only; ``fresh_base`` gives one that may be changed."""
    return load_base(DEFAULT_MODEL)


@pytest.fixture
def fresh_base() -> Base:
    return load_base(DEFAULT_MODEL)


def labelled(rows: Sequence[EncodedRow], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """``rows`` padded, with their labels, as transformers' models take them: none of our own code in it."""
    longest = max(map(len, rows))

    def padded(lists: Iterable[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*values, *[fill] * (longest - len(values))] for values in lists])

    return {
        "input_ids": padded((row.input_ids for row in rows), pad_id),
        "attention_mask": padded(([1] * len(row) for row in rows), 0),
        "labels": padded((row.labels for row in rows), -100),
    }


def tiny_llama(seed: int = 0, tied: bool = False) -> nn.Module:
    """A two-layer Llama with SmolLM2's vocabulary and 32 features."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def numba_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every test process finds the loops that another one has compiled."""
    return tmp_path_factory.getbasetemp().parent / "numba"


@pytest.fixture(scope="session")
def tiny_folder(real_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a model folder, with SmolLM2's tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    real_base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit status, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            importlib.import_module("rankfold.cli.main").main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a .jsonl file and return its path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def joke_rows() -> list[dict]:
    return [
        {"prompt": f"Joke about {n} hats?", "completion": f"There were {n} hats. All fit."} for n in range(24)
    ]


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give every LoRA factor of ``model`` random values, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def rankfold_command(*arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return Command(*arguments, input=input).finish()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("torchrun")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, input="")
