"""Runs in an engine's own environment, which need not have anything of ours, and answers for it.

``python engine_worker.py NAME`` reads a line of settings from its standard input, and then questions, a line
each, until an empty line; it writes a line for each answer to them, in any order, and reads the next.  Lines
are JSON:

* settings: model, adapter (or null) and its rank, dtype, context, and of the drawing top_p, top_k, min_p,
  repetition_penalty, stop (texts), stops (tokens), logprobs
* question: number, ids, seed, temperature, max_new_tokens
* answer: number, tokens, finish_reason, logprobs (or null)"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

CACHE_GB = "4"  # of vLLM on a CPU, for keys and values
Question = dict[str, Any]


def main(engine: str, asked: TextIO, told: TextIO) -> None:
    settings = json.loads(asked.readline())
    for answer in ENGINES[engine](settings, groups(asked)):
        told.write(f"{json.dumps(answer)}\n")
        told.flush()


def groups(lines: Iterable[str]) -> Iterator[list[Question]]:
    """The questions up to each empty line."""
    group: list[Question] = []
    for line in lines:
        if line.strip():
            group.append(json.loads(line))
        else:
            yield group
            group = []


def by_llama_cpp(settings: dict[str, Any], asked: Iterator[list[Question]]) -> Iterator[dict[str, Any]]:
    from llama_cpp import Llama

    drawn = {"repeat_penalty": settings["repetition_penalty"], "min_p": settings["min_p"]}
    drawn |= {"top_k": settings["top_k"], "top_p": settings["top_p"]}
    model = Llama(
        settings["model"],
        lora_path=settings["adapter"],
        n_ctx=settings["context"],
        n_threads=os.cpu_count(),
        verbose=False,
    )
    for question in (question for group in asked for question in group):
        model.set_seed(question["seed"] % 2**32)
        tokens: list[int] = []
        most = min(question["max_new_tokens"], settings["context"] - len(question["ids"]))
        for token in model.generate(question["ids"], temp=question["temperature"], **drawn):
            tokens.append(token)
            text = model.detokenize(tokens) if settings["stop"] else b""
            said = token in settings["stops"] or any(stop.encode() in text for stop in settings["stop"])
            if said or len(tokens) >= most:
                break
        reason = "stop" if said else "length"
        yield {"number": question["number"], "tokens": tokens, "finish_reason": reason, "logprobs": None}


def by_vllm(settings: dict[str, Any], asked: Iterator[list[Question]]) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GB)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = settings["adapter"]
    model = LLM(
        settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["context"],
        enable_lora=adapter is not None,
        max_lora_rank=settings["rank"] or 16,
        enforce_eager=True,
    )
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
    drawn = {name: settings[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty", "stop")}
    drawn |= {"stop_token_ids": settings["stops"], "logprobs": 0 if settings["logprobs"] else None}
    for group in asked:
        how = [
            SamplingParams(
                max_tokens=each["max_new_tokens"],
                temperature=each["temperature"],
                seed=each["seed"] % 2**31,
                ignore_eos=True,  # which is one of the stops if it is to end an answer
                **drawn,
            )
            for each in group
        ]
        prompts = [{"prompt_token_ids": each["ids"]} for each in group]
        found = model.generate(prompts, how, lora_request=lora, use_tqdm=False)
        for question, [output] in zip(group, (each.outputs for each in found), strict=True):
            tokens = list(output.token_ids)
            likely = zip(output.logprobs or (), tokens, strict=False)
            yield {
                "number": question["number"],
                "tokens": tokens,
                "finish_reason": output.finish_reason,
                "logprobs": [each[token].logprob for each, token in likely] if settings["logprobs"] else None,
            }


ENGINES = {"llama.cpp": by_llama_cpp, "vllm": by_vllm}

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # engines print what they like to standard output
    os.dup2(2, 1)
    main(sys.argv[1], sys.stdin, answers)
