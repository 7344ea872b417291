"""An engine that is installed answers in our place: in a process, and perhaps an environment, of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from rankfold.errors import ConfigError, DataError, ModelError
from rankfold.models.answering.answer import Answer
from rankfold.models.answering.answerable import context_of
from rankfold.models.answering.answers import in_turn, prompt_of, stops_of
from rankfold.models.answering.asked import Question
from rankfold.models.answering.sampling import Sampling
from rankfold.models.answering.streaming import decoded
from rankfold.models.base.base import Base
from rankfold.models.choices import ModelRequest
from rankfold.models.gguf.adapter import write_gguf_adapter
from rankfold.models.gguf.file import read_gguf
from rankfold.peft_surface import PeftModel

WORKER = Path(__file__).with_name("engine_worker.py")
GROUP = 256  # questions that an engine is given at a time
COMPARED, COMPARED_TOKENS = 3, 16  # answers that must begin like ours, and how far is looked
CONTEXT = 8192  # tokens: engines reserve memory for what they are told
SEEDS = 2**63
ENDING_S = 5  # for an engine to end by itself
TOLD = 1500  # characters of what an engine said before it ended


@dataclass
class Worker:
    """An engine's process; ``log`` is what it says beside its answers."""

    process: subprocess.Popen[str]
    log: TextIO
    base: Base
    sampling: Sampling
    context: int

    def answers(
        self, questions: Iterable[tuple[int, Question]], greedy: int = 0
    ) -> Iterator[tuple[int, Answer]]:
        """Numbers of questions with their answers; with ``greedy`` the likeliest, of up to so many tokens."""
        left = iter(questions)
        while group := list(islice(left, GROUP)):
            prompts: dict[int, int] = {}
            for number, question in group:
                try:
                    ids, seen = prompt_of(self.base, question)
                    if seen:
                        raise DataError("this engine is not given images here; leave --engine out")
                    if len(ids) >= self.context:
                        raise DataError(
                            f"the prompt has {len(ids):,} tokens, and the engine reads {self.context:,}"
                        )
                except DataError as error:
                    yield number, Answer.missing(str(error))
                    continue
                prompts[number] = len(ids)
                self._ask(number, ids, greedy)
            self._write("\n")
            for _ in range(len(prompts)):
                yield self._answer(prompts)

    def _ask(self, number: int, ids: Sequence[int], greedy: int) -> None:
        seed = random.Random(f"{self.sampling.seed}/{number}").randrange(SEEDS)
        question = {
            "number": number,
            "ids": ids,
            "seed": seed,
            "temperature": 0.0 if greedy else self.sampling.temperature,
            "max_new_tokens": greedy or self.sampling.max_new_tokens,
        }
        self._write(f"{json.dumps(question)}\n")

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _answer(self, prompts: Mapping[int, int]) -> tuple[int, Answer]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        said = json.loads(line)
        tokens, number = said["tokens"], said["number"]
        text = decoded(self.base.tokenizer, tokens, self.sampling.stop)
        return number, Answer(text, tokens, said["finish_reason"], prompts[number], said["logprobs"])

    def _ended(self) -> ModelError:
        self.process.wait()
        self.log.seek(0)
        said = self.log.read()[-TOLD:].strip()
        return ModelError(f"the engine's process ended (status {self.process.returncode}); it said: {said}")


@contextmanager
def engine_worker(
    name: str, python: Path | None, base: Base, asked: ModelRequest, sampling: Sampling
) -> Iterator[Worker]:
    """The engine ``name`` with the model of ``base``, which is what was ``asked`` for.

    ``python`` runs it, by default the interpreter of this process.  Raises ConfigError for what it cannot
    do, ModelError if it cannot be started."""
    _refuse(name, asked, sampling)
    context = int(min(context_of(base.model), CONTEXT))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        model, lora = _files(name, base, asked.adapter, Path(folder))
        settings = sampling.model_dump(mode="json", include={"top_p", "top_k", "min_p", "stop", "logprobs"})
        settings |= {"repetition_penalty": sampling.repetition_penalty, "stops": sorted(stops_of(base))}
        settings |= {"model": str(model), "adapter": lora, "rank": _rank(base), "context": context}
        settings["dtype"] = str(base.model.dtype).removeprefix("torch.")
        process = subprocess.Popen(
            [str(python or sys.executable), str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        worker = Worker(process, log, base, sampling, context)
        try:
            worker._write(f"{json.dumps(settings)}\n")
            yield worker
        finally:
            _end(process)


def _refuse(name: str, asked: ModelRequest, sampling: Sampling) -> None:
    """Raise ConfigError for what is asked and the engine has no place for."""
    own_numbers = name == "llama.cpp"
    found = {
        "generation_config": sampling.generation_config,
        "stored": asked.stored is not None,
        "logprobs": own_numbers and sampling.logprobs,
        "precision": own_numbers and asked.precision is not None,
    }
    if refused := ", ".join(option for option, is_given in found.items() if is_given):
        raise ConfigError(f"{refused}: {name} has nothing for it here; leave that or --engine out")


def _end(process: subprocess.Popen[str]) -> None:
    """Let it end as its questions have; if it does not, with all that it has started: vLLM computes in
    processes of its own, which would stay."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_S)
    if not hasattr(os, "killpg"):
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def compared(worker: Worker, questions: Sequence[Question]) -> str:
    """How far the engine's first answers are ours, in words.  Raises ModelError if not one begins like ours:
    then it is not the same model, or is not asked the same."""
    numbered = list(enumerate(questions))
    likeliest = Sampling(temperature=0, max_new_tokens=COMPARED_TOKENS)
    own = dict(in_turn(worker.base, numbered, likeliest))
    its = dict(worker.answers(numbered, COMPARED_TOKENS))
    same = [_alike(own[n].tokens, its[n].tokens) for n, _ in numbered if not own[n].problem]
    if same and not max(same):
        raise ModelError(
            "none of the engine's first answers begins like our own; it does not answer with this model. "
            "Leave --engine out"
        )
    lengths = ", ".join(f"{count} of {len(own[n].tokens)}" for n, count in enumerate(same))
    return f"of the engine's first {len(same)} answers so many tokens are our own: {lengths}"


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _files(name: str, base: Base, adapter: Path | None, folder: Path) -> tuple[Path, str | None]:
    """The files of the model and of its adapter that the engine reads."""
    if name == "vllm":
        location = base.source.location
        if base.source.gguf_file is not None or not isinstance(location, Path):
            raise ConfigError(
                f"vLLM reads a model's folder, and {base.source.name} is none; name one with --model"
            )
        return location, None if adapter is None else str(adapter)
    file = base.source.gguf_file
    if file is None:
        raise ConfigError(
            f"llama.cpp reads a GGUF file, and {base.source.name} is none; name one with --model"
        )
    if adapter is None:
        return file, None
    told = read_gguf(file, words=False)
    write_gguf_adapter(base.model, told.architecture, told.tensors, folder / "adapter.gguf")
    return file, str(folder / "adapter.gguf")


def _rank(base: Base) -> int:
    """The highest rank of its adapter's pairs, as the steps that vLLM knows; 0 if there is none."""
    if not isinstance(base.model, PeftModel):
        return 0
    [config] = base.model.peft_config.values()
    highest = max([config.r, *config.rank_pattern.values()])
    return next((step for step in (8, 16, 32, 64, 128, 256, 320, 512) if step >= highest), highest)
