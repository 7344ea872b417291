"""How fast questions are answered: one alone, many at once, a whole file; beside transformers' ``generate``.

    python benchmarks/generation.py prompts.jsonl

One process holds the base as it is, rounded to bfloat16's numbers, with an adapter beside the weights, and as
its file's blocks.  Sides answer the same prompts in turn with as many tokens, so that a slow moment of the
machine meets all.  The rows of the file must have a ``question``, as GSM8K's have."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parts.figures import Figure, parser, record

from rankfold import LoraConfig, Sampling, answers, get_peft_model, load_base
from rankfold.models.answering.answers import reply
from rankfold.models.answering.asked import Question
from rankfold.models.base.base import Base
from rankfold.models.choices import ModelRequest
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.predict.engines import engine_worker

RANK = 8
SHARED_TOKENS = 500
MANY = 32


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--tokens", type=int, default=64, help="of an answer")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--file-rows", type=int, default=200, help="questions of the whole file")
    made.add_argument("--file-tokens", type=int, default=128, help="of their answers")
    made.add_argument("--llama", type=Path, help="a Python interpreter that has llama-cpp-python")
    made.add_argument("--vllm", type=Path, help="one that has vLLM")
    options = made.parse_args()
    lines = options.data.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines[: max(options.file_rows, MANY)]]
    base = load_base(options.model)
    with no_end(base):
        figures = [*one(base, options, asked), *many(base, options, asked), shared(base, options, asked)]
        figures.append(whole_file(base, options, asked[: options.file_rows]))
        if options.llama:
            figures += beside_engine(base, options, asked, "llama.cpp", options.llama)
        if options.vllm:
            with tempfile.TemporaryDirectory() as folder:
                base.model.save_pretrained(folder)
                base.tokenizer.save_pretrained(folder)
                figures += beside_engine(load_base(folder), options, asked, "vllm", options.vllm)
    record(figures)


@contextmanager
def no_end(base: Base) -> Iterator[None]:
    """Every answer is as long as it may be, so that all sides do the same work."""
    from rankfold.models.answering import answers as module
    from rankfold.predict import engines

    own = module.stops_of
    module.stops_of = engines.stops_of = lambda _: frozenset()
    try:
        yield
    finally:
        module.stops_of = engines.stops_of = own


def one(base: Base, options: Any, asked: list[str]) -> list[Figure]:
    sides: dict[str, Callable[[str], None]] = {"transformers": lambda q: theirs(base, q, options.tokens)}
    models = {"own": base, "unmerged": adapted(options.model), "bfloat16": rounded(options.model)}
    if base.source.gguf_file is not None:
        models["held"] = load_base(options.model, stored="gguf")
    for name, model in models.items():
        sides[name] = lambda q, model=model: ours(model, [q], options.tokens, 1)
    rounds = in_turn(sides, asked[: options.rounds + 1], options.tokens)
    compared = [
        ("one", "one prompt alone, beside transformers' generate", "own", "transformers", 2),
        ("unmerged", "the same with an adapter beside the weights", "unmerged", "transformers", 1),
        (
            "bfloat16",
            "one prompt alone, weights that are numbers of bfloat16, beside transformers' generate",
            "bfloat16",
            "transformers",
            2,
        ),
        ("held", "one prompt, the base held as its file's blocks, to as float32", "held", "own", 1),
    ]
    return [figure(*each, rounds) for each in compared if each[2] in sides]


def many(base: Base, options: Any, asked: list[str]) -> list[Figure]:
    """Tokens a second of ``MANY`` prompts at once, and of fewer, to those of transformers one by one."""
    alone = [rate(lambda q=q: theirs(base, q, options.tokens), options.tokens) for q in asked[:3]]
    found = []
    for count in (4, 8, 16, MANY):
        group = asked[:count]
        rates = [
            rate(lambda g=group: ours(base, g, options.tokens, len(g)), options.tokens * count)
            for _ in range(2)
        ]
        found.append(
            Figure(
                name=f"generation_{count}_at_once",
                what=f"{count} prompts at once, beside transformers' generate one by one",
                unit="tokens/s",
                ratios=[each / statistics.median(alone) for each in rates],
                ours=statistics.median(rates),
                theirs=statistics.median(alone),
                at_least=16 if count == MANY else None,
            )
        )
    return found


def shared(base: Base, options: Any, asked: list[str]) -> Figure:
    """Until the first token of prompts with a beginning in common, once it is there, to without one."""
    words = " ".join(asked[20:])
    ids = prompt_encoder(base.tokenizer).text_ids(words)[:SHARED_TOKENS]
    system = {"role": "system", "content": base.tokenizer.decode(ids)}
    conversations = [[system, {"role": "user", "content": q}] for q in asked[: options.rounds]]
    sampling = Sampling(max_new_tokens=1, temperature=0)
    apart = [seconds(lambda c=c: reply(base, c, sampling)) for c in conversations]
    given = answers(base, [conversations[0], *conversations], sampling, 1)
    next(given)
    together = [seconds(lambda: next(given)) for _ in conversations]
    return Figure(
        name="generation_shared_prefix",
        what=f"time to the first token: {SHARED_TOKENS} tokens in common read before, to read anew",
        unit="s",
        ratios=[this / that for this, that in zip(together, apart, strict=True)],
        ours=statistics.median(together),
        theirs=statistics.median(apart),
        at_most=0.3,
    )


def whole_file(base: Base, options: Any, asked: list[str]) -> Figure:
    """Tokens a second of a whole file, to those of transformers one by one on its first rows."""
    tokens = options.file_tokens
    alone = [rate(lambda q=q: theirs(base, q, tokens), tokens) for q in asked[:4]]
    rated = rate(lambda: ours(base, asked, tokens, MANY), tokens * len(asked))
    return Figure(
        name="generation_file",
        what=f"{len(asked)} questions with {tokens} tokens each, beside transformers' generate one by one",
        unit="tokens/s",
        ratios=[rated / each for each in alone],
        ours=rated,
        theirs=statistics.median(alone),
        at_least=10,
    )


def beside_engine(base: Base, options: Any, asked: list[str], name: str, python: Path) -> list[Figure]:
    """Tokens a second of one prompt alone and of many at once, to the engine's."""
    sampling = Sampling(max_new_tokens=options.tokens, temperature=0)
    found = []
    with engine_worker(name, python, base, ModelRequest(), sampling) as worker:
        for count in (1, MANY):
            group = asked[:count]
            numbered = [(n, Question([{"role": "user", "content": q}])) for n, q in enumerate(group)]
            list(worker.answers(numbered[:1], 4))  # it starts, and warms up
            tokens = options.tokens * count
            its = [rate(lambda n=numbered: list(worker.answers(n)), tokens) for _ in range(3)]
            ours_too = [rate(lambda g=group: ours(base, g, options.tokens, MANY), tokens) for _ in range(3)]
            found.append(
                Figure(
                    name=f"generation_{name}_{count}",
                    what=f"{count} prompt{'s at once' if count > 1 else ''}, ours in float32 beside {name}'s",
                    unit="tokens/s",
                    ratios=[own / other for own, other in zip(ours_too, its, strict=True)],
                    ours=statistics.median(ours_too),
                    theirs=statistics.median(its),
                    at_least=0.75 if name == "vllm" and count == MANY else None,
                )
            )
    return found


def adapted(name: str) -> Base:
    base = load_base(name)
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.01)
    return replace(base, model=model.eval())


def rounded(name: str) -> Base:
    """In float32, with weights as most models come."""
    base = load_base(name)
    for parameter in base.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return base


def ours(base: Base, asked: list[str], tokens: int, at_once: int) -> None:
    found = list(answers(base, asked, Sampling(max_new_tokens=tokens, temperature=0), at_once))
    check({len(answer.tokens) for answer in found}, tokens)


def theirs(base: Base, question: str, tokens: int) -> None:
    ids = prompt_encoder(base.tokenizer).prompt_ids([{"role": "user", "content": question}])
    prompt = torch.tensor([ids], device=base.model.device)
    with torch.inference_mode():
        out = base.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
    check({out.shape[1] - prompt.shape[1]}, tokens)


def check(lengths: set[int], tokens: int) -> None:
    if lengths != {tokens}:
        raise SystemExit(f"{sorted(lengths)} tokens were made, not {tokens}")


def in_turn(sides: dict[str, Callable[[str], None]], asked: list[str], tokens: int) -> list[dict[str, float]]:
    """Tokens a second of each side by round; the first round warms up."""
    rounds = []
    for place, question in enumerate(asked):
        order = list(sides)[:: -1 if place % 2 else 1]
        rounds.append({name: rate(lambda n=name, q=question: sides[n](q), tokens) for name in order})
    return rounds[1:]


def rate(work: Callable[[], object], tokens: int) -> float:
    return tokens / seconds(work)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def figure(
    name: str, what: str, first: str, second: str, goal: float, rounds: list[dict[str, float]]
) -> Figure:
    return Figure(
        name=f"generation_{name}",
        what=what,
        unit="tokens/s",
        ratios=[each[first] / each[second] for each in rounds],
        ours=statistics.median(each[first] for each in rounds),
        theirs=statistics.median(each[second] for each in rounds),
        at_least=goal,
    )


if __name__ == "__main__":
    main()
