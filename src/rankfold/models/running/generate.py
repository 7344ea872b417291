"""Asking a model for text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import DataError
from rankfold.models.base.load import Base
from rankfold.models.messages.images import image_paths, image_prompt
from rankfold.models.messages.prompt import TemplateMessage, prompt_encoder
from rankfold.models.messages.turn import turn_form
from rankfold.models.running.sampling import Sampling

CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes were not generated
TOGETHER = 64  # prompts answered at a time: beyond, a CPU gains nothing

Prompt = tuple[list[int], dict[str, Tensor]]  # its tokens, and what else the model reads of its images


def reply(base: Base, messages: list[TemplateMessage], sampling: Sampling, streamer: Any = None) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    The prompt's tokens are those of training (see ``PromptEncoder``); words that spell a control token stay
    words.  For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  A model that sees images gets those that stand in the messages' contents as parts
    ``{"type": "image", "path": ...}``.  ``streamer`` is a transformers streamer that gets the tokens as they
    come.  Raises DataError."""
    return _answers(base, [_prompt(base, messages)], sampling, streamer)[0]


def replies(base: Base, conversations: Sequence[list[TemplateMessage]], sampling: Sampling) -> list[str]:
    """What ``reply`` gives for each of ``conversations``, faster: prompts of one length are answered
    together, so that none is padded.  With a temperature above 0 what is drawn depends on those beside it.

    Raises DataError."""
    prompts = [_prompt(base, messages) for messages in conversations]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, (ids, seen) in enumerate(prompts):
        alike.setdefault((len(ids), *((name, *value.shape) for name, value in seen.items())), []).append(
            place
        )
    answers: dict[int, str] = {}
    for places in alike.values():
        for start in range(0, len(places), TOGETHER):
            group = places[start : start + TOGETHER]
            answers |= zip(group, _answers(base, [prompts[place] for place in group], sampling), strict=True)
    return [answers[place] for place in range(len(prompts))]


def _answers(base: Base, prompts: list[Prompt], sampling: Sampling, streamer: Any = None) -> list[str]:
    """The answers to prompts of one length."""
    device = base.model.device
    inputs = torch.tensor([ids for ids, _ in prompts], device=device)
    seen = {name: torch.cat([each[name] for _, each in prompts]).to(device) for name in prompts[0][1]}
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        output = base.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **seen,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(_stops(base)) or None,
            pad_token_id=base.tokenizer.eos_token_id,
            streamer=streamer,
            **options,
        )
    decoded = [base.tokenizer.decode(row[inputs.shape[1] :], skip_special_tokens=True) for row in output]
    return [answer.rstrip(CUT_CHARACTER).strip() for answer in decoded]


def _prompt(base: Base, messages: list[TemplateMessage]) -> Prompt:
    encoder = prompt_encoder(base.tokenizer)
    if base.prompt_style == "plain":
        return encoder.text_ids(messages[-1]["content"]), {}
    if base.processor is not None:
        return image_prompt(base.processor, messages)
    if image_paths(messages):
        raise DataError("the messages hold images, and this model cannot see them")
    return encoder.prompt_ids(messages), {}


def _stops(base: Base) -> frozenset[int]:
    """The tokens that end an answer: those that training teaches, and those that the model names itself."""
    own = base.model.generation_config.eos_token_id
    taught = (
        {base.tokenizer.eos_token_id}
        if base.prompt_style == "plain"
        else turn_form(prompt_encoder(base.tokenizer)).stop_ids
    )
    return frozenset({*taught, *(own if isinstance(own, list) else [own])} - {None})
