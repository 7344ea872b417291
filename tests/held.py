"""Random held matrices with ordinary numbers, for the tests of several rooms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.storage.forms import FORMS, to_bf16, to_int8
from rankfold.storage.layers import HeldLayer, hold

FORM_NAMES = list(FORMS)
# Where a block of the type has its float16 numbers.
HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2]}


def random_held(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random matrix held as ``name``, its numbers of the order of 0.1 to 10."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    plain = {"INT8": to_int8, "BF16": to_bf16, "F16": lambda w: w.half().view(torch.uint8)}
    if name in plain:
        return plain[name](weight)
    form = FORMS[name]
    held = torch.randint(0, 256, (rows, form.row_bytes(columns)), dtype=torch.uint8, generator=draw)
    blocks = held.view(-1, form.block(columns)[1])
    for start in HALVES.get(name, [0, 2]):
        scale = 0.01 * (1 + torch.rand(len(blocks), 1, generator=draw))
        blocks[:, start : start + 2] = scale.half().view(torch.uint8)
    return held


def hold_all(model: nn.Module, name: str) -> list[HeldLayer]:
    """Give every linear layer and embedding of ``model`` random weights held as ``name``."""
    layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)]
    return [hold(layer, FORMS[name], random_held(name, *layer.weight.shape)) for layer in layers]
