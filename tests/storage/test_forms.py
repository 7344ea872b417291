from __future__ import annotations

import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import ModelError
from rankfold.storage.forms import BF16, FORMS, INT8, expanded, numbers_at, to_bf16, to_int8


@pytest.mark.parametrize("name", [name for name in FORMS if name != "INT8"])
def test_block_sizes_are_those_of_gguf(name):
    form = FORMS[name]
    assert form.block(form.numbers) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K"])
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(name):
    with pytest.raises(ModelError, match=f"a row of 100 numbers cannot be held as {name}, in blocks of"):
        FORMS[name].row_bytes(100)
    with pytest.raises(ModelError, match="a row of 0 numbers"):
        FORMS[name].row_bytes(0)


@pytest.mark.parametrize(
    "held",
    [torch.zeros(3, 19, dtype=torch.uint8), torch.zeros(3, 18), torch.zeros(54, dtype=torch.uint8)],
    ids=["too long", "no bytes", "no matrix"],
)
def test_bytes_of_another_shape_are_refused(held):
    with pytest.raises(ModelError, match=r"held as Q4_0 is uint8 \(rows, 18\); got"):
        FORMS["Q4_0"].check(held, 32)


def test_bytes_that_lie_apart_are_refused():
    with pytest.raises(ModelError, match="must be contiguous"):
        FORMS["Q4_0"].check(torch.zeros(18, 3, dtype=torch.uint8).T, 32)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), columns=st.integers(1, 70))
def test_int8_misses_by_half_a_step_of_the_row_at_most(seed, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10
    weight[0] = 0
    numbers = expanded(to_int8(weight), INT8, columns)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((numbers - weight).abs() <= 0.5001 * step).all()


def test_int8_of_nan_is_refused():
    with pytest.raises(ModelError, match="NaN or infinite"):
        to_int8(torch.tensor([[1.0, float("nan")]]))


def test_bf16_is_the_nearest():
    weight = torch.randn(4, 7)
    assert torch.equal(expanded(to_bf16(weight), BF16, 7), weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_rounded_once(dtype):
    held = to_int8(torch.randn(4, 64))
    assert torch.equal(expanded(held, INT8, 64, dtype), expanded(held, INT8, 64).to(dtype))


@pytest.mark.parametrize("name", FORMS)
def test_single_numbers_are_those_of_the_whole(name):
    form, columns = FORMS[name], 512
    held = torch.randint(0, 256, (5, form.row_bytes(columns)), dtype=torch.uint8)
    rows, places = torch.tensor([0, 4, 4, 2]), torch.tensor([0, 511, 32, 300])
    wanted = expanded(held, form, columns)[rows, places]
    found = numbers_at(held, form, columns, rows, places)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
