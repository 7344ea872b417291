"""What training on held weights costs: the memory and time of one step on an 8B model, and the speed of
SmolLM2 held as its GGUF file's blocks beside float32.

    python benchmarks/large_base.py                     both
    python benchmarks/large_base.py --only large --keep-activations

The 8B model has Llama 3's shapes (32 layers of 4096 x 14336, 32 and 8 heads) and random Q4_0 blocks; one step
is 256 tokens, rank 16 on all linear layers, AdamW, with activations recomputed, in a child process whose peak
memory is read from the system.  SmolLM2's figure is the median over pairs of steps in one process, so that a
slow moment of the machine meets both."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from parts.figures import Figure, record
from torch import nn

from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batch import Batch
from rankfold.data.order.batching import Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.judging.losses import token_losses
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.heap import large_blocks_apart
from rankfold.models.base.load import load_base
from rankfold.storage.forms import FORMS
from rankfold.storage.layers import can_hold, hold
from rankfold.train.planning.recomputing import recompute_activations

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KILOBYTE, GIGABYTE = 1024, 1e9
SCALE = 0.002  # of a random block: weights of about 0.01


def random_base(layers: int, vocabulary: int) -> Any:
    """A Llama of 8B's shapes whose linear layers and embedding hold random Q4_0 blocks."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    form = FORMS["Q4_0"]
    for module in list(model.modules()):
        if can_hold(module):
            rows, columns = module.weight.shape
            held = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8)
            scale = torch.tensor([SCALE], dtype=torch.float16).view(torch.uint8)
            held.view(rows, -1, form.block(columns)[1])[..., :2] = scale
            hold(module, form, held)
        elif "weight" in module._parameters:
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    return model


def step(model: Any, optimiser: torch.optim.Optimizer, batch: Batch) -> float:
    """One training step on ``batch``; its seconds."""
    started = time.perf_counter()
    losses = token_losses(model, batch)
    losses.mean().backward()
    optimiser.step()
    optimiser.zero_grad()
    return time.perf_counter() - started


def batch_of(ids: torch.Tensor) -> Batch:
    """Rows of which every token is trained."""
    return Padded().collate([EncodedRow("", row, row) for row in ids.tolist()], 0, "cpu")


def adapted(base: Any, rank: int) -> tuple[Any, torch.optim.Optimizer]:
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS)).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def large(layers: int, vocabulary: int, tokens: int, recompute: bool) -> dict[str, float]:
    torch.manual_seed(0)
    with large_blocks_apart():  # as load_base does
        base = random_base(layers, vocabulary)
    model, optimiser = adapted(base, rank=16)
    if recompute:
        recompute_activations(model)
    ids = torch.randint(0, vocabulary, (1, tokens))
    seconds = step(model, optimiser, batch_of(ids))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
    trainable, total = model.get_nb_trainable_parameters()
    return {"weights": total - trainable, "trainable": trainable, "peak": peak / GIGABYTE, "seconds": seconds}


def large_figure(given: argparse.Namespace) -> Figure:
    kept = ["--keep-activations"] if given.keep_activations else []
    words = [
        f"--layers={given.layers}",
        f"--vocabulary={given.vocabulary}",
        f"--tokens={given.tokens}",
        *kept,
    ]
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Figure(
        name="large_base_memory",
        what=f"a step of 1 x {given.tokens} tokens at rank 16 on {found['weights'] / 1e9:.1f}B weights in "
        f"Q4_0 blocks, activations {'kept' if kept else 'recomputed'}",
        unit="GB at the peak",
        ratios=[found["peak"]],
        ours=found["peak"],
        at_most=9.0,
        more={"seconds": found["seconds"]},
    )


def small_figure(pairs: int, tokens: int) -> Figure:
    """The speed of a step on SmolLM2 held as blocks, as a share of its speed in float32."""
    torch.manual_seed(0)
    ids = torch.randint(0, 40000, (4, tokens // 4))
    batch = batch_of(ids)
    sides = [adapted(load_base(DEFAULT_MODEL, stored=stored).model, rank=8) for stored in (None, "gguf")]
    for side in sides:
        step(*side, batch)
    taken = [[step(*side, batch) for side in sides] for _ in range(pairs)]
    plain, held = (tokens / statistics.median(side) for side in zip(*taken, strict=True))
    return Figure(
        name="held_gguf_speed",
        what="training on the base held as its GGUF file's blocks, beside float32",
        unit="tokens/s",
        ratios=[plain / held for plain, held in taken],
        ours=held,
        theirs=plain,
        at_least=0.9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["large", "small"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=256, help="of the step on the large model")
    parser.add_argument("--keep-activations", action="store_true", help="instead of recomputing them")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(large(given.layers, given.vocabulary, given.tokens, not given.keep_activations)))
        return
    if given.only != "large":
        record([small_figure(given.pairs, tokens=1600)])
    if given.only != "small":
        record([large_figure(given)])


if __name__ == "__main__":
    main()
