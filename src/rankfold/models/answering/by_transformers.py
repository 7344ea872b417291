"""Answers by transformers' own ``generate``, one by one: for models and settings that the loop has not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rankfold.models.answering.answer import Answer
from rankfold.models.answering.answerable import plain_model
from rankfold.models.answering.asked import Asked
from rankfold.models.answering.sampling import Sampling
from rankfold.models.answering.streaming import TextStream, decoded, stop_place, words
from rankfold.models.base.base import Base
from rankfold.models.base.quiet import quiet_transformers

SEEDS = 2**63


class _Streamer:
    """What transformers calls a streamer, over a ``TextStream``."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.ids: list[int] = []
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if not self.is_prompt:
            self.ids += value.flatten().tolist()
            self.stream.put(self.ids)
        self.is_prompt = False

    def end(self) -> None:
        self.stream.end(self.ids)


def answer(base: Base, asked: Asked, sampling: Sampling, stops: frozenset[int]) -> Answer:
    """The answer to one prompt; a search with beams is written whole at its end."""
    device = base.model.device
    inputs = torch.tensor([asked.ids], device=device)
    seen = {name: value.to(device) for name, value in asked.seen.items()}
    options = sampling.options(base.model)
    stream = TextStream(base.tokenizer, asked.write, sampling.stop) if asked.write else None
    at_once = stream is None or options.get("num_beams", 1) > 1
    how: dict[str, Any] = {} if at_once else {"streamer": _Streamer(stream)}  # type: ignore[arg-type]
    if sampling.stop:
        how |= {"stop_strings": list(sampling.stop), "tokenizer": base.tokenizer}
    with torch.random.fork_rng(), torch.inference_mode(), _only(base, options, stops):
        torch.manual_seed(random.Random(asked.seed).randrange(SEEDS))
        output = base.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **seen,
            **how,
            output_logits=sampling.logprobs,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, len(asked.ids) :].tolist()
    if stream is not None and at_once:
        stream.end(tokens)
    said = stop_place(words(base.tokenizer, tokens), sampling.stop) is not None
    logprobs = None
    if sampling.logprobs:
        likely = (logits[0].float().log_softmax(dim=-1) for logits in output.logits)
        logprobs = [float(each[token]) for each, token in zip(likely, tokens, strict=True)]
    return Answer(
        decoded(base.tokenizer, tokens, sampling.stop),
        tokens,
        "stop" if said or (tokens and tokens[-1] in stops) else "length",
        len(asked.ids),
        logprobs,
    )


@contextmanager
def _only(base: Base, options: dict[str, Any], stops: frozenset[int]) -> Iterator[None]:
    """Let ``options`` alone say how is generated: transformers takes what they leave out from the model's own
    ``generation_config``, which may hold a penalty or beams."""
    from transformers import GenerationConfig

    fill = base.tokenizer.pad_token_id if base.tokenizer.eos_token_id is None else base.tokenizer.eos_token_id
    model = plain_model(base.model)
    own = model.generation_config
    with quiet_transformers():
        model.generation_config = GenerationConfig(
            **options, eos_token_id=sorted(stops) or None, pad_token_id=fill
        )
    try:
        yield
    finally:
        model.generation_config = own
