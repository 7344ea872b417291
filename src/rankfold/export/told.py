"""What the tuned model says to prompts, and what another program that reads what was written says to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.data.shapes.example import Example
from rankfold.models.answering.answers import answers, prompt_of
from rankfold.models.answering.asked import Question
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.messages.prompt import prompt_encoder

ANSWER_TOKENS = 48
OWN_TOKENS = 96  # of a row's own answer


@dataclass(frozen=True)
class Told:
    """What the tuned model makes of one prompt: its tokens, the answer's, whether that came to an end, and
    the logarithms of the likelihoods (positions, vocabulary) at each token of the answer.

    ``own``: the tokens of the answer that the row has, and ``own_loss`` what that costs the tuned model, in
    nats, and ``base_loss`` the base without the adapter."""

    question: Question
    ids: list[int]
    answer: list[int]
    ended: bool
    logprobs: Tensor
    own: list[int]
    own_loss: float
    base_loss: float


@dataclass(frozen=True)
class Said:
    """What another program makes of the same prompt: its tokens, the answer and whether it came to an end,
    the likelihoods at each token of the tuned model's answer, and the loss of the row's own answer."""

    ids: list[int]
    answer: list[int]
    ended: bool
    logprobs: Tensor
    own_loss: float


@torch.inference_mode()
def told_by(base: Base, examples: Sequence[Example]) -> list[Told]:
    """What the tuned model ``base``, its adapter apart, says to the prompts of ``examples``; those that it
    cannot be asked are left out."""
    found = []
    prompts = [list(example.prompt) for example in examples]
    for example, prompt, answer in zip(examples, prompts, _answers(base, prompts), strict=True):
        if answer.problem:
            continue
        question = Question(prompt)
        ids, _ = prompt_of(base, question)
        own = _own_answer(base, example)
        own_loss = loss_of(base.model, ids, own)
        with base.model.disable_adapter():
            base_loss = loss_of(base.model, ids, own)
        logprobs = logprobs_of(base.model, ids, answer.tokens)
        ended = answer.finish_reason == "stop"
        found.append(Told(question, ids, answer.tokens, ended, logprobs, own, own_loss, base_loss))
    return found


@torch.inference_mode()
def said_by(base: Base, told: Sequence[Told]) -> Iterator[Said]:
    """What ``base`` says, with our own tokenizer and loop."""
    asked = [list(each.question.messages) for each in told]
    for each, answer in zip(told, list(_answers(base, asked)), strict=True):
        ids, _ = prompt_of(base, each.question)
        logprobs = logprobs_of(base.model, each.ids, each.answer)
        own_loss = loss_of(base.model, each.ids, each.own)
        yield Said(ids, answer.tokens, answer.finish_reason == "stop", logprobs, own_loss)


def _answers(base: Base, prompts: Sequence[Any]) -> Iterator[Any]:
    return answers(base, prompts, Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0.0))


def _own_answer(base: Base, example: Example) -> list[int]:
    text = example.answer
    if not example.messages:  # a text, whose first words are the prompt
        text = text.removeprefix(str(example.prompt[-1]["content"]))
    encoder = prompt_encoder(base.tokenizer)
    return encoder.ids_now([encoder.text_piece(text)])[:OWN_TOKENS]


def logprobs_of(model: Any, ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    """At each token of ``answer`` after the prompt ``ids``: (tokens, vocabulary)."""
    whole = torch.tensor([[*ids, *answer]], device=model.device)
    logits = model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1).cpu()
    return found


def loss_of(model: Any, ids: Sequence[int], answer: Sequence[int]) -> float:
    """What ``answer`` costs after the prompt ``ids``, in nats."""
    if not answer:
        return 0.0
    return -float(logprobs_of(model, ids, answer)[range(len(answer)), list(answer)].sum())
