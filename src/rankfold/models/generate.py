"""Asking a model for text."""

from __future__ import annotations

from typing import Any

import torch

from rankfold.errors import DataError
from rankfold.models.images import image_paths, image_prompt
from rankfold.models.load import Base
from rankfold.models.prompt import TemplateMessage, prompt_encoder
from rankfold.models.sampling import Sampling
from rankfold.models.turn import turn_form

CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes were not generated


def reply(base: Base, messages: list[TemplateMessage], sampling: Sampling, streamer: Any = None) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    The prompt's tokens are those of training (see ``PromptEncoder``); words that spell a control token stay
    words.  For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  A model that sees images gets those that stand in the messages' contents as parts
    ``{"type": "image", "path": ...}``.  ``streamer`` is a transformers streamer that gets the tokens as they
    come.  Raises DataError."""
    encoder = prompt_encoder(base.tokenizer)
    seen: dict[str, Any] = {}
    if base.prompt_style == "plain":
        ids = encoder.text_ids(messages[-1]["content"])
        stops = frozenset({base.tokenizer.eos_token_id} - {None})
    else:
        ids, seen = _prompt(base, messages)
        stops = turn_form(encoder).stop_ids
    inputs = torch.tensor([ids], device=base.model.device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        output = base.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **{name: value.to(inputs.device) for name, value in seen.items()},
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(stops | _own_stops(base.model)) or None,
            pad_token_id=base.tokenizer.eos_token_id,
            streamer=streamer,
            **options,
        )
    answer: str = base.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return answer.rstrip(CUT_CHARACTER).strip()


def _prompt(base: Base, messages: list[TemplateMessage]) -> tuple[list[int], dict[str, Any]]:
    """The prompt's tokens, and what else the model reads of its images."""
    if base.processor is not None:
        return image_prompt(base.processor, messages)
    if image_paths(messages):
        raise DataError("the messages hold images, and this model cannot see them")
    return prompt_encoder(base.tokenizer).prompt_ids(messages), {}


def _own_stops(model: Any) -> set[int]:
    """The stop tokens that the model names itself; training teaches the tokenizer's and the template's."""
    own = model.generation_config.eos_token_id
    return set(own if isinstance(own, list) else [own]) - {None}
