from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from rankfold.storage.forms import FORMS, expanded

GGUF_FORMS = [name for name in FORMS if name != "INT8"]
EVERY = pytest.mark.parametrize("name", GGUF_FORMS)


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Whether all are equal to the bit, signs of zeros included, any NaN being equal to any other."""
    other = torch.from_numpy(np.ascontiguousarray(theirs))
    equal = (ours.view(torch.int32) == other.view(torch.int32)) | (ours.isnan() & other.isnan())
    return ours.shape == other.shape and bool(equal.all())


@EVERY
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_any_bytes_expand_to_the_bits_that_gguf_gives(name, seed, rows, blocks):
    """Random bytes are scales of every kind, too: infinite, NaN, subnormal and negative ones."""
    form = FORMS[name]
    columns = form.numbers * blocks
    draw = np.random.default_rng(seed)
    held = draw.integers(0, 256, (rows, form.row_bytes(columns)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = dequantize(held, gguf.GGMLQuantizationType[name])
    assert same_bits(expanded(torch.from_numpy(held), form, columns), theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_has_quantised_comes_back_close(name):
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    held = torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    bits = int(name[1])
    gap = (expanded(held, FORMS[name], 96) - weight).abs().max()
    assert gap < 8 / 2**bits


def test_a_matrix_of_more_than_one_piece_is_expanded_whole(monkeypatch):
    form = FORMS["Q5_K"]
    held = torch.randint(0, 256, (9, form.row_bytes(512)), dtype=torch.uint8)
    whole = expanded(held, form, 512)
    monkeypatch.setattr("rankfold.storage.forms.PIECE", 1024)
    torch.testing.assert_close(expanded(held, form, 512), whole, rtol=0, atol=0, equal_nan=True)
