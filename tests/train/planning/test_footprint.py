from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from conftest import tiny_llama
from rankfold.models.base.packed import Content, Holding, fill
from rankfold.storage.layers import held_layers
from rankfold.train.planning.footprint import (
    FORMS_TO_PLAN,
    Weight,
    parameters_by_part,
    stored_bytes,
    weights_of,
)

FORMS = {form.name: form for form in FORMS_TO_PLAN}


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_counted_once(tied):
    model = tiny_llama(tied=tied)
    weights = weights_of(model)
    total = sum(p.numel() for p in model.parameters())
    assert sum(weight.numbers for weight in weights) == total == sum(parameters_by_part(weights).values())
    assert parameters_by_part(weights)["embeddings and head"] == (1 if tied else 2) * 49152 * 32
    assert stored_bytes(weights, FORMS["float32"]) == sum(p.nbytes for p in model.parameters())


def test_int8_is_what_a_held_model_takes():
    model = tiny_llama()
    weights = weights_of(model)
    contents = {name: (lambda p=p: Content(p.detach().clone())) for name, p in model.named_parameters()}
    heads = frozenset({id(model.get_output_embeddings())})
    fill(model, contents, Holding("int8", torch.float32, heads=heads))
    assert held_layers(model)
    assert stored_bytes(weights, FORMS["int8"]) == sum(p.nbytes for p in model.parameters())


def test_nf4_is_what_bitsandbytes_takes():
    layer = nn.Linear(512, 256)
    packed, state = bnb.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
    real = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    weight = Weight(512 * 256, 512, "language", can_be_held=True, is_linear=True)
    assert FORMS["nf4"].size(weight, 4) == real


def test_a_tower_and_what_no_block_fits_take_more():
    odd, even = (Weight(columns * 4, columns, "language", True, True) for columns in (40, 64))
    tower = Weight(64 * 4, 64, "vision", True, True)
    assert FORMS["q4_0"].size(odd, 4) == (40 + 4) * 4
    assert [FORMS[name].size(tower, 4) for name in ("int8", "q4_0", "nf4")] == [64 * 4 * 4] * 3
    assert FORMS["q4_0"].size(even, 4) == 64 * 4 * 18 // 32
