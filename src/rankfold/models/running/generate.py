"""Asking a model for text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.errors import DataError
from rankfold.models.base.base import Base
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.messages.images import image_paths, image_prompt
from rankfold.models.messages.prompt import TemplateMessage, prompt_encoder
from rankfold.models.messages.turn import turn_form
from rankfold.models.running.sampling import Sampling
from rankfold.models.running.streaming import TextStream, decoded
from rankfold.peft_surface import PeftModel

TOGETHER = 64  # prompts answered at a time: beyond, a CPU gains nothing

Prompt = tuple[list[int], dict[str, Tensor]]  # its tokens, and what else the model reads of its images


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its words; its tokens, with the one that ended it; whether that was said ("stop") or there
    was no room for more ("length"); and how many tokens the prompt had."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def reply(
    base: Base,
    messages: list[TemplateMessage],
    sampling: Sampling,
    write: Callable[[str], object] | None = None,
) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    The prompt's tokens are those of training (see ``PromptEncoder``); words that spell a control token stay
    words.  For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  A model that sees images gets those that stand in the messages' contents as parts
    ``{"type": "image", "path": ...}``.  ``write`` gets the answer piece by piece as it comes; a search with
    beams (see ``Sampling.generation_config``) comes whole at the end.  Raises DataError."""
    return _answers(base, [_prompt(base, messages)], sampling, write)[0].text


def replies(base: Base, conversations: Sequence[list[TemplateMessage]], sampling: Sampling) -> list[str]:
    """The words of ``answer_all``."""
    return [answer.text for answer in answer_all(base, conversations, sampling)]


def answer_all(
    base: Base, conversations: Sequence[list[TemplateMessage]], sampling: Sampling
) -> list[Answer]:
    """What ``reply`` gives for each of ``conversations``, faster: prompts of one length are answered
    together, so that none is padded.  With a temperature above 0 what is drawn depends on those beside it.

    Raises DataError."""
    prompts = [_prompt(base, messages) for messages in conversations]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, (ids, seen) in enumerate(prompts):
        alike.setdefault((len(ids), *((name, *value.shape) for name, value in seen.items())), []).append(
            place
        )
    answers: dict[int, Answer] = {}
    for places in alike.values():
        for start in range(0, len(places), TOGETHER):
            group = places[start : start + TOGETHER]
            answers |= zip(group, _answers(base, [prompts[place] for place in group], sampling), strict=True)
    return [answers[place] for place in range(len(prompts))]


def _answers(
    base: Base, prompts: list[Prompt], sampling: Sampling, write: Callable[[str], object] | None = None
) -> list[Answer]:
    """The answers to prompts of one length."""
    device = base.model.device
    inputs = torch.tensor([ids for ids, _ in prompts], device=device)
    seen = {name: torch.cat([each[name] for _, each in prompts]).to(device) for name in prompts[0][1]}
    options = sampling.options(base.model)
    at_once = write is not None and options.get("num_beams", 1) > 1
    stream = None if write is None or at_once else TextStream(base.tokenizer, write)
    with torch.random.fork_rng(), torch.inference_mode(), _only(base, options):
        torch.manual_seed(sampling.seed)
        output = base.model.generate(inputs, attention_mask=torch.ones_like(inputs), **seen, streamer=stream)
    stops = _stops(base)
    answers = [_answer(base, row[inputs.shape[1] :].tolist(), stops, inputs.shape[1]) for row in output]
    if write is not None and at_once:
        write(answers[0].text)
    return answers


def _answer(base: Base, ids: list[int], stops: Collection[int], prompt_tokens: int) -> Answer:
    """``ids`` may go on behind the token that ends the answer, where others beside it are longer."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    tokens = ids if end is None else ids[: end + 1]
    return Answer(decoded(base.tokenizer, tokens), tokens, "length" if end is None else "stop", prompt_tokens)


@contextmanager
def _only(base: Base, options: dict[str, Any]) -> Iterator[None]:
    """Let ``options`` alone say how is generated: transformers takes what they leave out from the model's own
    ``generation_config``, which may hold a penalty or beams."""
    from transformers import GenerationConfig

    stops = sorted(_stops(base)) or None
    fill = base.tokenizer.pad_token_id if base.tokenizer.eos_token_id is None else base.tokenizer.eos_token_id
    model = base.model.get_base_model() if isinstance(base.model, PeftModel) else base.model
    own = model.generation_config
    with quiet_transformers():
        model.generation_config = GenerationConfig(**options, eos_token_id=stops, pad_token_id=fill)
    try:
        yield
    finally:
        model.generation_config = own


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
