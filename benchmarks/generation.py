"""How fast an adapted model answers, merged and not, beside transformers' ``generate`` on the plain base.

    python benchmarks/generation.py prompts.jsonl

One process holds the base three times: plain, with an adapter merged, and with it beside the weights.  They
answer the same prompts in turn with as many tokens, so that a slow moment of the machine meets all.  The rows
of the file must have a ``question``, as GSM8K's have."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from parts.figures import Figure, parser, record

from rankfold import LoraConfig, get_peft_model, load_base

RANK = 8
UNMERGED = 0.9


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--tokens", type=int, default=64, help="of an answer")
    made.add_argument("--prompts", type=int, default=15)
    options = made.parse_args()
    sides = {name: model_of(options.model, name) for name in ("plain", "merged", "unmerged")}
    tokenizer = load_base(options.model).tokenizer
    lines = options.data.read_text(encoding="utf-8").splitlines()[: options.prompts + 1]
    prompts = [tokenizer(json.loads(line)["question"], return_tensors="pt").input_ids for line in lines]
    rounds = []
    for place, prompt in enumerate(prompts):
        order = list(sides)[:: -1 if place % 2 else 1]
        rounds.append({name: speed(sides[name], prompt, options.tokens) for name in order})
    rounds = rounds[1:]  # the first warms up
    goals = {"merged": 1.0, "unmerged": UNMERGED}
    record([figure(name, goal, rounds) for name, goal in goals.items()])


def model_of(name: str, kind: str) -> Any:
    base = load_base(name).model
    if kind == "plain":
        return base
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.merge_and_unload() if kind == "merged" else model.eval()


def speed(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Tokens a second of an answer of ``tokens`` tokens."""
    prompt = prompt.to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
    if out.shape[1] != prompt.shape[1] + tokens:
        raise SystemExit(f"{out.shape[1] - prompt.shape[1]} tokens were made, not {tokens}")
    return tokens / (time.perf_counter() - started)


def figure(name: str, goal: float, rounds: list[dict[str, float]]) -> Figure:
    return Figure(
        name=f"generation_{name}",
        what=f"answers with the adapter {name}, beside transformers' generate on the plain base",
        unit="tokens/s",
        ratios=[each[name] / each["plain"] for each in rounds],
        ours=statistics.median(each[name] for each in rounds),
        theirs=statistics.median(each["plain"] for each in rounds),
        at_least=goal,
    )


if __name__ == "__main__":
    main()
