"""Asking a model for text."""

from __future__ import annotations

from typing import Any

import torch

from rankfold.models.load import Base
from rankfold.models.prompt import TemplateMessage, prompt_encoder
from rankfold.models.sampling import Sampling
from rankfold.models.turn import turn_form

CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes were not generated


def reply(base: Base, messages: list[TemplateMessage], sampling: Sampling, streamer: Any = None) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    The prompt's tokens are those of training (see ``PromptEncoder``); words that spell a control token stay
    words.  For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  ``streamer`` is a transformers streamer that gets the tokens as they come."""
    encoder = prompt_encoder(base.tokenizer)
    if base.prompt_style == "plain":
        ids = encoder.text_ids(messages[-1]["content"])
        stops = frozenset({base.tokenizer.eos_token_id} - {None})
    else:
        ids = encoder.prompt_ids(messages)
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
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(stops | _own_stops(base.model)) or None,
            pad_token_id=base.tokenizer.eos_token_id,
            streamer=streamer,
            **options,
        )
    answer: str = base.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return answer.rstrip(CUT_CHARACTER).strip()


def _own_stops(model: Any) -> set[int]:
    """The stop tokens that the model names itself; training teaches the tokenizer's and the template's."""
    own = model.generation_config.eos_token_id
    return set(own if isinstance(own, list) else [own]) - {None}
