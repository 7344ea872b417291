"""Whether what was written says what the tuned model says: asked of another program that reads it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.shapes.example import Example
from rankfold.models.answering.answer import Question
from rankfold.models.answering.answers import answers, prompt_of
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.quiet import quiet_transformers

ANSWER_TOKENS = 48
# The mean divergence, in nats a token, that rounding the merged weights explains.
MOST_KL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Told:
    """What the tuned model makes of one prompt: its tokens, the answer's, whether that came to an end, and
    the logarithms of the likelihoods (positions, vocabulary) at each token of the answer."""

    question: Question
    ids: list[int]
    answer: list[int]
    ended: bool
    logprobs: Tensor


@dataclass
class Certificate:
    """What was compared on ``prompts`` prompts and ``positions`` positions of their answers.  ``mean_kl`` is
    that of the written model to the tuned one, in nats; ``same_likeliest`` the share of positions with one
    likeliest token; ``update_lost`` what rounding took of the adapter's change of a weight, to its length, in
    most layers.  ``problems`` say why it does not hold."""

    format: str
    engine: str
    dtype: str
    prompts: int = 0
    positions: int = 0
    tokens_equal: int = 0
    answers_equal: int = 0
    ends_equal: int = 0
    largest_gap: float = 0.0
    mean_kl: float = 0.0
    same_likeliest: float = 1.0
    update_lost: float = 0.0
    worst_lost: float = 0.0
    worst_layer: str = ""
    problems: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"version": 1, "holds": not self.problems} | asdict(self)


@torch.inference_mode()
def told_by(base: Base, examples: Sequence[Example]) -> list[Told]:
    """What the tuned model ``base`` says to the prompts of ``examples``."""
    prompts = [list(example.prompt) for example in examples]
    found = []
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    for prompt, answer in zip(prompts, answers(base, prompts, sampling), strict=True):
        if answer.problem:
            continue
        question = Question(prompt)
        ids, _ = prompt_of(base, question)
        logprobs = _logprobs(base.model, ids, answer.tokens)
        ended = answer.finish_reason == "stop"
        found.append(Told(question, ids, answer.tokens, ended, logprobs))
    return found


def _logprobs(model: Any, ids: list[int], answer: list[int]) -> Tensor:
    """At each token of ``answer`` after the prompt ``ids``: (tokens, vocabulary)."""
    whole = torch.tensor([ids + answer], device=model.device)
    logits = model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1).cpu()
    return found


@torch.inference_mode()
def certify(folder: Path, made: Certificate, told: Sequence[Told], style: str) -> Certificate:
    """Fill in ``made`` with what transformers reads from ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kl = same = 0.0
    for each in told:
        ids = _ids(tokenizer, each.question, style)
        made.tokens_equal += ids == each.ids
        answer, ended = _answer(model, tokenizer, each.ids)
        made.answers_equal += answer == each.answer
        made.ends_equal += ended == each.ended or answer != each.answer
        logprobs = _logprobs(model, each.ids, each.answer)
        made.largest_gap = max(made.largest_gap, float((logprobs - each.logprobs).abs().max()))
        kl += float((each.logprobs.exp() * (each.logprobs - logprobs)).sum())
        same += float((logprobs.argmax(-1) == each.logprobs.argmax(-1)).sum())
        made.positions += len(each.answer)
        made.prompts += 1
    if made.positions:
        made.mean_kl, made.same_likeliest = kl / made.positions, same / made.positions
    made.problems = _problems(made)
    return made


def engine() -> str:
    return f"transformers {importlib.metadata.version('transformers')}"


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


def _problems(made: Certificate) -> list[str]:
    most = MOST_KL[made.dtype]
    wrong = {
        f"{made.prompts - made.tokens_equal} of {made.prompts} prompts become other tokens": made.tokens_equal
        < made.prompts,
        f"{made.prompts - made.ends_equal} of {made.prompts} answers end elsewhere": made.ends_equal
        < made.prompts,
        f"its likelihoods are {made.mean_kl:.2g} nats a token from the tuned model's, and rounding to "
        f"{made.dtype} explains {most:g}": not made.mean_kl <= most,
    }
    return [text for text, holds in wrong.items() if holds]


def sums_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` by its name there."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found
