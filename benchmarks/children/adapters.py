"""Child process: what seven further adapters cost that are loaded and not active, pair by pair."""

from __future__ import annotations

import time
from typing import Any

import torch
from parts.sides import Job, Result, be_child

from rankfold import LoraConfig, get_peft_model, load_base

OTHERS = 7
ROWS = 2  # forward and backward of each by itself, as the time is to show calls, not products


def measure(job: Job) -> Result:
    """Seconds of forward and backward of the first rows with one adapter loaded and with eight."""
    one, eight = adapted(job, 0), adapted(job, OTHERS)
    batches = [
        {name: torch.tensor([row[name]], device=one.device) for name in ("input_ids", "labels")}
        for row in job["steps"][0][:ROWS]
    ]
    pairs = []
    for place in range(job["pairs"] + 1):
        order = (one, eight) if place % 2 else (eight, one)
        seconds = {id(model): seconds_of(model, batches) for model in order}
        pairs.append((seconds[id(one)], seconds[id(eight)]))
    return {"pairs": pairs[1:]}


def adapted(job: Job, others: int) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear"
    )
    model = get_peft_model(load_base(job["model"]).model, config)
    for number in range(others):
        model.add_adapter(f"other{number}", config)
    model.set_adapter("default")
    return model.train()


def seconds_of(model: Any, batches: list[dict[str, Any]]) -> float:
    started = time.perf_counter()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    be_child(measure)
