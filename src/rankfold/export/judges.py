"""The programs that read what was written: transformers, an engine in a process of its own, or our reader."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rankfold.errors import ConfigError, ExportError
from rankfold.export.told import ANSWER_TOKENS, Said, Told, logprobs_of, loss_of, said_by
from rankfold.models.answering.asked import Question
from rankfold.models.base.base import Base
from rankfold.models.base.quiet import quiet_transformers

WORKER = Path(__file__).with_name("judge_worker.py")
MODULES = {"llama.cpp": "llama_cpp", "mlx-lm": "mlx_lm"}
PACKAGES = {"llama.cpp": "llama-cpp-python", "mlx-lm": "mlx-lm"}
TOLD = 1500  # characters of what an engine said before it ended


@dataclass(frozen=True)
class Judge:
    """A program by its name and version, and what it says to prompts."""

    name: str
    says: Callable[[Sequence[Told]], Iterator[Said]]


def transformers_judge(folder: Path, style: str) -> Judge:
    name = f"transformers {importlib.metadata.version('transformers')}"
    return Judge(name, lambda told: _said_by_transformers(folder, style, told))


def own_judge(load: Callable[[], Base]) -> Judge:
    return Judge("our own reader", lambda told: said_by(load(), told))


@dataclass(frozen=True)
class Engine:
    """An engine that can be run: its name in ``MODULES``, and the interpreter that has it."""

    name: str
    python: str

    def version(self) -> str:
        code = f"from importlib.metadata import version; print(version({PACKAGES[self.name]!r}))"
        found = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        if found.returncode:
            raise ConfigError(f"{self.python} has no {PACKAGES[self.name]}: {found.stderr.strip()[-200:]}")
        return f"{self.name} ({PACKAGES[self.name]} {found.stdout.strip()})"

    def judge(self, model: Path, adapter: Path | None, style: str) -> Judge:
        """It, with an ``adapter`` in its own format or none."""

        def says(told: Sequence[Told]) -> Iterator[Said]:
            group = {"adapter": adapter and str(adapter), "prompts": [*map(_asked, told)], "asked": True}
            with TemporaryDirectory() as folder:
                [said] = self.run(Path(folder), model, style, [group])
                for number, (each, line) in enumerate(zip(told, said, strict=True)):
                    logits = np.load(Path(folder) / f"0-{number}.npy")
                    logprobs = torch.from_numpy(logits[:, : each.logprobs.shape[1]]).log_softmax(-1)
                    yield Said(line["ids"], line["answer"], line["ended"], logprobs, line["own_loss"])

        return Judge(self.version(), says)

    def run(
        self, folder: Path, model: Path, style: str, groups: Sequence[dict[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        """See ``judge_worker``.  Raises ExportError if it ends before it has answered."""
        job = {"model": str(model), "most_tokens": ANSWER_TOKENS, "style": style, "groups": groups}
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [self.python, str(WORKER), self.name, str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = _last_words(f"{done.stdout}\n{done.stderr}")
            raise ExportError(
                f"{self.name} cannot use what was written (status {done.returncode}); it is removed, and "
                f"{self.name} said: {said}"
            )
        found: list[list[dict[str, Any]]] = json.loads((folder / "said.json").read_text())
        return found


def engine_for(name: str, python: Path | None) -> Engine | None:
    """The engine ``name`` in the environment of ``python``, or in ours if it is there."""
    if python is not None:
        if not python.is_file():
            raise ConfigError(
                f"--engine-python {python}: no such file; name the interpreter of its environment"
            )
        return Engine(name, str(python))
    with suppress(ModuleNotFoundError):
        if importlib.util.find_spec(MODULES[name]) is not None:
            return Engine(name, sys.executable)
    return None


def _last_words(log: str) -> str:
    """What went wrong, of all that an engine tells: lines that speak of an error, and the last."""
    lines = [line.strip() for line in log.strip().splitlines()]
    wrong = [line for line in lines if "error" in line.lower() or "unsupported" in line.lower()]
    return "\n".join(dict.fromkeys([*wrong, *lines[-1:]]))[-TOLD:]


def _asked(told: Told) -> dict[str, Any]:
    return {
        "messages": [*told.question.messages],
        "tools": [*told.question.tools],
        "ids": told.ids,
        "answer": told.answer,
        "own": told.own,
    }


@torch.inference_mode()
def _said_by_transformers(folder: Path, style: str, told: Sequence[Told]) -> Iterator[Said]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for each in told:
        answer, ended = _answer(model, tokenizer, each.ids)
        logprobs = logprobs_of(model, each.ids, each.answer)
        ids, own_loss = _ids(tokenizer, each.question, style), loss_of(model, each.ids, each.own)
        yield Said(ids, answer, ended, logprobs, own_loss)


def _ids(tokenizer: Any, question: Question, style: str) -> list[int]:
    """The prompt as a program that uses transformers makes it."""
    if style == "plain":
        return list(tokenizer(question.messages[-1]["content"])["input_ids"])
    found = tokenizer.apply_chat_template(
        list(question.messages),
        tools=list(question.tools) or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return list(found["input_ids"])


def _answer(model: Any, tokenizer: Any, ids: list[int]) -> tuple[list[int], bool]:
    """The greedy answer by the folder's own generation config, and whether it came to an end."""
    inputs = torch.tensor([ids], device=model.device)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with quiet_transformers():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            pad_token_id=fill,
        )
    tokens = output[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    return tokens, bool(tokens) and tokens[-1] in (ends if isinstance(ends, list) else [ends])
