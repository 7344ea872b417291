"""The memory of one training step on InternVL2_5-8B, with an image.

    python benchmarks/internvl_8b.py
    python benchmarks/internvl_8b.py --keep-activations --rank 64

The shapes are those of OpenGVLab/InternVL2_5-8B, its config translated as for a real one; the weights are
random.  As with ``stored: q4_0``, the language model's linear layers hold Q4_0 blocks, its embeddings and
head int8; tower and projector are float32.  The blocks are drawn directly: 8B of float32 are never there.
One step is one image of one tile (448 x 448, 256 tokens) with a joke's length of text, LoRA on all linear
layers of the language model, AdamW, in a child process whose peak memory is read from the system."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import psutil
import torch
from large_base import GIGABYTE, KILOBYTE, LINEARS, SCALE, step
from parts.figures import Figure, record
from torch import nn

from rankfold import LoraConfig, get_peft_model
from rankfold.models.adapters.modalities import adapter_scope, model_parts
from rankfold.models.base.heap import large_blocks_apart
from rankfold.models.internvl.config import native_config
from rankfold.storage.forms import INT8, ROUNDED_Q4_0, Form
from rankfold.storage.layers import hold
from rankfold.train.planning.recomputing import recompute_activations

IMAGE_TOKEN, TILE, TILE_TOKENS = 92546, 448, 256
PROMPT_TOKENS, JOKE_TOKENS = 64, 48  # system prompt, question and marks; the answer, which is trained
ORIGINAL: dict[str, Any] = {
    "model_type": "internvl_chat",
    "force_image_size": TILE,
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v2",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 12,
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": TILE,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
    },
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": 92553,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "tie_word_embeddings": False,
    },
}


def random_internvl(layers: int) -> Any:
    """The model with ``layers`` layers of text, its weights random and held as with ``stored: q4_0``."""
    from accelerate import init_empty_weights
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    language = ORIGINAL["llm_config"] | {"num_hidden_layers": layers}
    config = InternVLConfig(**native_config(ORIGINAL | {"llm_config": language}, IMAGE_TOKEN))
    with init_empty_weights(include_buffers=False):
        model = InternVLForConditionalGeneration(config)
    parts = model_parts(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in list(model.named_modules()):
        in_language = parts.part_of(name) == "language" or module in ends
        if in_language and isinstance(module, nn.Linear | nn.Embedding):
            form = INT8 if module in ends else ROUNDED_Q4_0
            hold(module, form, random_rows(form, *module.weight.shape))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.randn(parameter.shape) * 0.02 + float("norm" in name and key == "weight")
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
    return model


def random_rows(form: Form, rows: int, columns: int) -> torch.Tensor:
    """Random numbers of about 0.01, held as ``form``."""
    held = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8)
    if form == INT8:
        held[:, :4] = torch.tensor([SCALE / 16], dtype=torch.float32).view(torch.uint8)
    else:
        scale = torch.tensor([SCALE], dtype=torch.float16).view(torch.uint8)
        held.view(rows, -1, form.block(columns)[1])[..., :2] = scale
    return held


def one_row() -> dict[str, torch.Tensor]:
    """A prompt with an image, and an answer, of which alone the tokens are trained."""
    tokens = PROMPT_TOKENS + TILE_TOKENS + JOKE_TOKENS
    ids = torch.randint(3, 92500, (1, tokens))
    ids[:, 40 : 40 + TILE_TOKENS] = IMAGE_TOKEN
    labels = torch.where(torch.arange(tokens) >= tokens - JOKE_TOKENS, ids, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, TILE, TILE)}


def measure(layers: int, rank: int, recompute: bool) -> dict[str, float]:
    torch.manual_seed(0)
    with large_blocks_apart():  # as load_base does
        model = random_internvl(layers)
    options = adapter_scope(model, LINEARS).options()
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **options)).train()
    if recompute:
        recompute_activations(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    trainable, total = model.get_nb_trainable_parameters()
    before = psutil.Process().memory_info().rss
    seconds = step(model, optimiser, one_row())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
    moments = 3 * 4 * trainable  # gradients and AdamW's two moments, which are no activations either
    return {
        "weights": total - trainable,
        "trainable": trainable,
        "before": before / GIGABYTE,
        "moments": moments / GIGABYTE,
        "peak": peak / GIGABYTE,
        "seconds": seconds,
    }


def figure(given: argparse.Namespace) -> Figure:
    kept = ["--keep-activations"] if given.keep_activations else []
    words = [f"--layers={given.layers}", f"--rank={given.rank}", *kept]
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = PROMPT_TOKENS + TILE_TOKENS + JOKE_TOKENS
    return Figure(
        name="internvl_8b_memory",
        what=f"a step of 1 x {tokens} tokens, {TILE_TOKENS} of them an image, at rank {given.rank} on "
        f"InternVL2_5-8B's shapes ({found['weights'] / 1e9:.1f}B weights, the language model in 4 bits), "
        f"activations {'kept' if kept else 'recomputed'}",
        unit="GB at the peak",
        ratios=[found["peak"]],
        ours=found["peak"],
        at_most=9.0,
        more={
            "seconds": found["seconds"],
            "before_the_step_gb": found["before"],
            "gradients_and_moments_gb": found["moments"],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep-activations", action="store_true", help="instead of recomputing them")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.layers, given.rank, not given.keep_activations)))
        return
    record([figure(given)])


if __name__ == "__main__":
    main()
