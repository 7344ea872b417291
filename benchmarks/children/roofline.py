"""Child process: the matrix products that a step cannot do without, and nothing else.

For each adapted layer, on the model's own weights: forward, the gradient towards its input, and the LoRA
products (two forward, four backward); for the head both of these on trained tokens only.  No attention, no
norms, no loss, no optimiser; activations are buffers that are used again and again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from parts.sides import Job, Result, be_child
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

REPEATS = 3
BLOCK_TOKENS = 1024  # what fits the caches of a small processor; the whole step at once is tried too


def measure(job: Job) -> Result:
    """Seconds of the mean step of ``steps``, the better of two ways to cut it: whole, or in blocks."""
    measured = job["steps"][1:] or job["steps"]
    tokens = sum(len(row["input_ids"]) for step in measured for row in step) / len(measured)
    trained = sum(len(row["labels"]) - row["labels"].count(-100) for step in measured for row in step)
    trained = trained / len(measured)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job.get("precision", "float32"))
    )
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    blocks = max(1, round(tokens / BLOCK_TOKENS))
    cuts = {count: (round(tokens / count), round(trained / count)) for count in {1, blocks}}
    seconds = {count: count * median_seconds(products(model, job["rank"], *cuts[count])) for count in cuts}
    best = min(seconds, key=seconds.__getitem__)
    flops = best * operations(model, job["rank"], *cuts[best])
    return {"tokens": tokens, "seconds": seconds[best], "gigaflops": flops / seconds[best] / 1e9}


def median_seconds(action: Callable[[], None]) -> float:
    action()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def layers_of(model: Any) -> list[tuple[nn.Linear, bool]]:
    """The adapted layers, and whether a gradient must go on through them: below the first block's
    attention there is nothing to train."""
    found = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name
    ]
    first = found[0][0].rpartition(".")[0]
    inputs = {f"{first}.{name}_proj" for name in "qkv"}
    return [(layer, name not in inputs) for name, layer in found]


def products(model: Any, rank: int, tokens: int, trained: int) -> Callable[[], None]:
    """Forward and backward products of one block of ``tokens`` tokens, ``trained`` of them with a loss."""
    layers, head = layers_of(model), model.get_output_embeddings().weight
    widths = {size for layer, _ in layers for size in layer.weight.shape} | {rank}
    buffers = {width: torch.randn(tokens, width).to(head) for width in widths}
    outputs = {width: torch.empty_like(buffer) for width, buffer in buffers.items()}
    pairs = {
        layer: (torch.randn(rank, layer.in_features).to(head), torch.randn(layer.out_features, rank).to(head))
        for layer, _ in layers
    }
    hidden, logits = (
        torch.randn(trained, head.shape[1]).to(head),
        torch.empty(trained, head.shape[0]).to(head),
    )

    @torch.no_grad()
    def run() -> None:
        for layer, _ in layers:
            _forward(layer.weight, pairs[layer], buffers, outputs)
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head)
        for layer, goes_on in reversed(layers):
            _backward(layer.weight, pairs[layer], buffers, outputs, goes_on)

    return run


def _forward(weight: Tensor, pair: tuple[Tensor, Tensor], buffers: Any, outputs: Any) -> None:
    (a, b), x = pair, buffers[weight.shape[1]]
    y = torch.mm(x, weight.T, out=outputs[weight.shape[0]])
    small = torch.mm(x, a.T, out=outputs[len(a)])
    y.addmm_(small, b.T)


def _backward(weight: Tensor, pair: tuple[Tensor, Tensor], buffers: Any, outputs: Any, goes_on: bool) -> None:
    (a, b), x, gradient = pair, buffers[weight.shape[1]], buffers[weight.shape[0]]
    torch.mm(buffers[len(a)].T, gradient)  # of lora_B, transposed: the fast way round
    small = torch.mm(gradient, b, out=outputs[len(a)])
    torch.mm(small.T, x)  # of lora_A
    if goes_on:
        onward = torch.mm(gradient, weight, out=outputs[weight.shape[1]])
        onward.addmm_(small, a)


def operations(model: Any, rank: int, tokens: int, trained: int) -> float:
    """Multiplications and additions of ``products``."""
    total = 4.0 * trained * model.get_output_embeddings().weight.numel()
    for layer, goes_on in layers_of(model):
        rows, columns = layer.weight.shape
        total += 2 * tokens * rows * columns * (2 if goes_on else 1)
        total += 2 * tokens * rank * (2 * (rows + columns) + rows + (columns if goes_on else 0))
    return total


if __name__ == "__main__":
    be_child(measure)
