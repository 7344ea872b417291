"""Runs in an engine's own environment, which need not have anything of ours; says what it makes of a model.

``python judge_worker.py NAME FOLDER`` reads FOLDER/job.json and writes FOLDER/said.json and, for each prompt
of each group, FOLDER/GROUP-PLACE.npy, the logits (positions, vocabulary) at each token of its answer.  A job:

* model, most_tokens (of an answer), style (plain: a text is gone on with)
* groups: adapter (or null), prompts: messages, tools, ids, answer, own; whether they are ``asked``, so that a
  prompt's own tokens and answer are wanted too

said.json has for each group, and each of its prompts, ids, answer, ended (if asked) and own_loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[list[int]], np.ndarray]  # of a text's tokens: (tokens, vocabulary)
Prompt = dict[str, Any]


class LlamaCpp:
    """One model, with one adapter or none."""

    def __init__(self, job: dict[str, Any], adapter: str | None) -> None:
        from llama_cpp import Llama, llama_vocab_is_eog

        longest = max(len(each["ids"]) for group in job["groups"] for each in group["prompts"])
        most = longest + max(job["most_tokens"], 128)
        self.model = Llama(
            job["model"], lora_path=adapter, n_ctx=most, n_batch=most, logits_all=True, verbose=True
        )
        self.is_end = lambda token: bool(llama_vocab_is_eog(self.model._model.vocab, token))

    def ids(self, prompt: Prompt, style: str) -> list[int]:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        if style == "plain":
            return list(self.model.tokenize(prompt["messages"][-1]["content"].encode(), special=True))
        texts: Any = self.model._model.token_get_text
        eos, bos = self.model.token_eos(), self.model.token_bos()
        template = self.model.metadata["tokenizer.chat_template"]
        form: Any = Jinja2ChatFormatter(template, *(texts(each) if each >= 0 else "" for each in (eos, bos)))
        made = form(messages=prompt["messages"], tools=prompt["tools"] or None)
        return list(self.model.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True))

    def logits(self, ids: list[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)], np.float32)

    def likeliest(self, ids: list[int]) -> Iterator[int]:
        self.model.reset()
        while True:
            self.model.eval(ids)
            ids = [int(self.model.scores[self.model.n_tokens - 1].argmax())]
            yield ids[0]


class Mlx:
    """One model, with one adapter or none."""

    def __init__(self, job: dict[str, Any], adapter: str | None) -> None:
        from mlx_lm import load

        self.model, self.tokenizer = load(job["model"], adapter_path=adapter)[:2]
        self.is_end = lambda token: token in self.tokenizer.eos_token_ids

    def ids(self, prompt: Prompt, style: str) -> list[int]:
        if style == "plain":
            return list(self.tokenizer.encode(prompt["messages"][-1]["content"]))
        made = self.tokenizer.apply_chat_template(
            prompt["messages"], tools=prompt["tools"] or None, add_generation_prompt=True, return_dict=False
        )
        return list(made)

    def logits(self, ids: list[int]) -> np.ndarray:
        import mlx.core as mx

        return np.array(self.model(mx.array([ids]))[0].astype(mx.float32))

    def likeliest(self, ids: list[int]) -> Iterator[int]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        while True:
            ids = [int(mx.argmax(self.model(mx.array([ids]), cache=cache)[0, -1]))]
            yield ids[0]


ENGINES: dict[str, Callable[[dict[str, Any], str | None], Any]] = {"llama.cpp": LlamaCpp, "mlx-lm": Mlx}


def answer_of(model: Any, ids: list[int], most: int) -> tuple[list[int], bool]:
    """The likeliest tokens, and whether they came to an end."""
    said: list[int] = []
    for token in islice(model.likeliest(ids), most):
        said.append(token)
        if model.is_end(token):
            return said, True
    return said, False


def loss_of(logits: np.ndarray, tokens: list[int]) -> float:
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    logprobs = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    return -float(logprobs[range(len(tokens)), tokens].sum())


def main(engine: str, folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    said = []
    for place, group in enumerate(job["groups"]):
        model = ENGINES[engine](job, group["adapter"])
        found = []
        for number, prompt in enumerate(group["prompts"]):
            start = len(prompt["ids"]) - 1
            logits = model.logits(prompt["ids"] + prompt["answer"])[start:-1]
            np.save(folder / f"{place}-{number}.npy", logits)
            line: dict[str, Any] = {"own_loss": 0.0}
            if prompt["own"]:
                line["own_loss"] = loss_of(
                    model.logits(prompt["ids"] + prompt["own"])[start:-1], prompt["own"]
                )
            if group["asked"]:
                answer, ended = answer_of(model, prompt["ids"], job["most_tokens"])
                line |= {"ids": model.ids(prompt, job["style"]), "answer": answer, "ended": ended}
            found.append(line)
        said.append(found)
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
