"""Asking a model for text."""

from __future__ import annotations

from typing import Any

import torch

from rankfold.models.load import Base
from rankfold.models.prompt import TemplateMessage, render, require_chat_template
from rankfold.models.sampling import Sampling

CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes were not generated


def reply(base: Base, messages: list[TemplateMessage], sampling: Sampling, streamer: Any = None) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  ``streamer`` is a transformers streamer that gets the tokens as they come."""
    if base.prompt_style == "plain":
        text = messages[-1]["content"]
    else:
        require_chat_template(base.tokenizer)
        text = render(base.tokenizer, messages, for_reply=True)
    encoded = base.tokenizer(text, return_tensors="pt", add_special_tokens=base.prompt_style == "plain")
    inputs = encoded["input_ids"].to(base.model.device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        output = base.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=_stop_tokens(base),
            pad_token_id=base.tokenizer.eos_token_id,
            streamer=streamer,
            **options,
        )
    answer: str = base.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return answer.rstrip(CUT_CHARACTER).strip()


def _stop_tokens(base: Base) -> list[int]:
    """The model's own stop tokens and the tokenizer's, which is the one training teaches."""
    own = base.model.generation_config.eos_token_id
    stops = own if isinstance(own, list) else [own]
    return sorted({token for token in (*stops, base.tokenizer.eos_token_id) if token is not None})
