from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from held import FORM_NAMES, random_held
from rankfold.storage import product
from rankfold.storage.forms import FORMS, expanded
from rankfold.storage.product import held_linear

EVERY = pytest.mark.parametrize("name", FORM_NAMES)


@pytest.fixture
def many_slices(monkeypatch):
    """Matrices of a few rows take several slices."""
    monkeypatch.setattr(product, "SLICE", 2 * 256)


def close(found: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor) -> None:
    """``found`` misses ``wanted``, sums of terms of these magnitudes, by float32's rounding at most."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= 1e-6 * terms).all()


@EVERY
@pytest.mark.usefixtures("many_slices")
@given(rows=st.integers(1, 9), blocks=st.integers(1, 2), tokens=st.integers(0, 4), seed=st.integers(0, 99))
def test_product_and_gradient_are_those_of_the_expanded_matrix(name, rows, blocks, tokens, seed):
    columns = 256 * blocks
    held = random_held(name, rows, columns, seed)
    weight = expanded(held, FORMS[name], columns, torch.float64)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, wanted = held_linear(x, held, FORMS[name]), F.linear(wide, weight)
    close(out, wanted, wide.abs() @ weight.abs().T)
    pull = torch.randn(wanted.shape, dtype=torch.float64)
    out.backward(pull.float())
    wanted.backward(pull)
    close(x.grad, wide.grad, pull.abs() @ weight.abs())


@pytest.mark.usefixtures("many_slices")
def test_first_and_second_derivatives_are_right():
    held, form = random_held("Q4_1", 5, 64), FORMS["Q4_1"]
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: held_linear(x, held, form), x)
    assert torch.autograd.gradgradcheck(lambda x: held_linear(x, held, form).sin(), x)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 0, 64), (2, 3, 4, 64)])
def test_any_leading_shape_goes_through(shape):
    held, x = random_held("Q8_0", 5, 64), torch.randn(shape)
    wanted = F.linear(x, expanded(held, FORMS["Q8_0"], 64))
    torch.testing.assert_close(held_linear(x, held, FORMS["Q8_0"]), wanted)


def test_autograd_keeps_the_bytes_and_nothing_else():
    held, kept = random_held("Q4_0", 8, 64), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        held_linear(x, held, FORMS["Q4_0"])
    assert [t.data_ptr() for t in kept] == [held.data_ptr()]


def test_memory_used_in_inference_mode_serves_training_afterwards():
    held, x = random_held("Q4_0", 8, 64), torch.randn(3, 64, requires_grad=True)
    product._own.__dict__.clear()
    with torch.inference_mode():
        held_linear(x, held, FORMS["Q4_0"])
    held_linear(x, held, FORMS["Q4_0"]).sum().backward()
    assert x.grad.abs().sum() > 0


def test_memory_is_used_again_and_grows_to_a_slice_at_most(monkeypatch):
    monkeypatch.setattr(product, "SLICE", 1024)
    product._own.__dict__.clear()
    for rows in (100, 3, 40):
        held_linear(torch.randn(1, 64), random_held("Q4_0", rows, 64), FORMS["Q4_0"])
    (memory,) = product._own.kept.values()
    assert len(memory) <= 1024


def test_threads_do_not_write_over_each_other():
    form, x = FORMS["Q4_0"], torch.randn(16, 256)
    mats = [random_held("Q4_0", 300, 256, seed) for seed in range(4)]
    wanted = [F.linear(x, expanded(held, form, 256)) for held in mats]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.allclose(held_linear(x, mats[index], form), wanted[index], rtol=1e-4, atol=1e-4):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
