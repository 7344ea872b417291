"""A server with a base and eight adapters, asked by sixteen clients, beside PEFT and ``generate`` one by one.

    python benchmarks/serving.py prompts.jsonl

The rows of the file must have a ``question``, as GSM8K's have.  The server is a process of its own, the
clients are OpenAI's; PEFT holds the same adapters and answers some of the same requests, before and after.
Every answer of the server is compared with that of its adapter alone, one prompt at a time, and the server's
memory is looked at while it answers ``--soak`` short requests more."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from parts.figures import Figure, parser, record

from rankfold import LoraConfig, Sampling, answers, get_peft_model, load_base, load_tuned

ADAPTERS, AT_ONCE, RANK = 8, 16, 16
LEARNT = 0.02  # of the numbers in B: the answers differ, and are still sentences
SEEDS = 8
Request = tuple[str, str]  # the name of who is asked, and the question


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--requests", type=int, default=200)
    made.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    made.add_argument("--beside", type=int, default=24, help="requests that PEFT answers")
    made.add_argument("--soak", type=int, default=2000, help="requests while memory is looked at")
    options = made.parse_args()
    lines = options.data.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    with tempfile.TemporaryDirectory() as place:
        folders = adapters(options.model, Path(place))
        names = ["base", *folders]
        drawn = random.Random(SEEDS)
        asked = [(drawn.choice(names), question) for question in questions[: options.requests]]
        model = theirs(options.model, folders, Path(place))
        some = asked[: options.beside]
        rates = [by_peft(model, some, options.tokens)]
        with server(options.model, folders) as (url, process):
            started, found = time.perf_counter(), together(url, asked, options.tokens)
            seconds = time.perf_counter() - started
            grown = soak(url, process, list(itertools.islice(itertools.cycle(asked), options.soak)))
        rates.append(by_peft(model, some, options.tokens))
        del model
        own = sum(tokens for _, tokens in found) / seconds
        same = alike(options.model, folders, asked, [text for text, _ in found], options.tokens)
    record(
        [
            Figure(
                name="serving_adapters",
                what=f"{len(asked)} requests over {ADAPTERS} adapters and the base, {AT_ONCE} at a time, "
                "beside PEFT and generate one by one",
                unit="tokens/s",
                ratios=[own / rate for rate in rates],
                ours=own,
                theirs=statistics.median(rates),
                at_least=4,
            ),
            Figure(
                name="serving_same_answers",
                what=f"of {len(asked)} greedy answers those that are word for word the adapter's alone",
                unit="answers",
                ratios=[same / len(asked)],
                ours=same,
                theirs=len(asked),
                at_least=1,
            ),
            *grown,
        ]
    )


def adapters(model: str, place: Path) -> dict[str, Path]:
    """Folders of adapters that have learnt something, if nothing of use."""
    found = {}
    for number in range(ADAPTERS):
        tuned = get_peft_model(
            load_base(model).model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        )
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=LEARNT)
        tuned.peft_config["default"].base_model_name_or_path = model
        folder = place / f"adapter{number}"
        tuned.save_pretrained(folder)
        found[folder.name] = folder
    return found


def theirs(model: str, folders: dict[str, Path], place: Path) -> Any:
    """PEFT's model with all adapters, and its tokenizer, over the base in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(model)
    base.model.save_pretrained(place / "base")
    plain = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    first, *others = folders.items()
    found = PeftModel.from_pretrained(plain, first[1], adapter_name=first[0])
    for name, folder in others:
        found.load_adapter(folder, adapter_name=name)
    return found.eval(), base.tokenizer


def by_peft(model: Any, asked: list[Request], tokens: int) -> float:
    """Tokens a second."""
    peft, tokenizer = model
    written, started = 0, time.perf_counter()
    for name, question in asked:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        how = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        how["attention_mask"] = torch.ones_like(ids)
        with torch.inference_mode():
            if name == "base":
                with peft.disable_adapter():
                    output = peft.generate(input_ids=ids, **how)
            else:
                peft.set_adapter(name)
                output = peft.generate(input_ids=ids, **how)
        written += output.shape[1] - ids.shape[1]
    return written / (time.perf_counter() - started)


@contextmanager
def server(model: str, folders: dict[str, Path]) -> Iterator[tuple[str, psutil.Process]]:
    named = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    command = [
        sys.executable,
        "-m",
        "rankfold",
        "serve",
        model,
        *named,
        "--port",
        "0",
        "--at-once",
        str(AT_ONCE),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
        finally:
            process.terminate()


def together(url: str, asked: list[Request], tokens: int) -> list[tuple[str, int]]:
    """The answers with their tokens, asked by AT_ONCE clients."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", timeout=600)

    def ask(request: Request) -> tuple[str, int]:
        name, question = request
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=tokens
        )
        assert answer.usage is not None
        return answer.choices[0].message.content or "", answer.usage.completion_tokens

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, asked))


def soak(url: str, process: psutil.Process, asked: list[Request]) -> list[Figure]:
    """What the server's memory grows by over ``asked``, of which the first tenth warms it up."""
    if not asked:
        return []
    warm = len(asked) // 10
    together(url, asked[:warm], 4)
    before = process.memory_info().rss
    together(url, asked[warm:], 4)
    after = process.memory_info().rss
    return [
        Figure(
            name="serving_memory",
            what=f"the server's memory after {len(asked):,} requests, to that after {warm:,}",
            unit="MB",
            ratios=[after / before],
            ours=after / 1e6,
            theirs=before / 1e6,
            at_most=1.05,
        )
    ]


def alike(model: str, folders: dict[str, Path], asked: list[Request], found: list[str], tokens: int) -> int:
    """How many of ``found`` are what the adapter says alone, one prompt after another."""
    same = 0
    for name in dict.fromkeys(name for name, _ in asked):
        alone = load_base(model) if name == "base" else load_tuned(folders[name])
        places = [place for place, (who, _) in enumerate(asked) if who == name]
        prompts = [asked[place][1] for place in places]
        likeliest = Sampling(max_new_tokens=tokens, temperature=0)
        for place, answer in zip(places, answers(alone, prompts, likeliest, at_once=1), strict=True):
            same += answer.text == found[place]
    return same


if __name__ == "__main__":
    main()
