from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from rankfold.kernels import few_rows as module
from rankfold.kernels.few_rows import few_rows, in_bfloat16, linear

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="without Numba torch computes")


@pytest.fixture
def always(monkeypatch, numba_cache):
    """As if Numba had been measured to be faster with up to 64 rows."""
    from rankfold.kernels import numba_forms

    assert numba_forms.prepare_products(numba_cache) == ""
    monkeypatch.setattr(module, "_known", [(64, numba_forms)])


@needs_numba
@pytest.mark.parametrize("features", [1, 2, 5, 48])
@pytest.mark.parametrize("columns", [1, 7, 64, 577])
def test_products_are_those_of_float64(always, numba_cache, features, columns):
    torch.manual_seed(0)
    weight, bias = torch.randn(features, columns), torch.randn(features)
    with few_rows([weight], numba_cache), torch.inference_mode():
        for rows in (1, 2, 3, 4, 5, 8, 11, 64, 65):
            x = torch.randn(rows, columns)
            wanted = F.linear(x.double(), weight.double(), bias.double())
            assert torch.allclose(linear(x, weight, bias).double(), wanted, atol=2e-5 * columns**0.5)
            shaped = linear(x[None].expand(1, -1, -1), weight)
            assert torch.equal(shaped[0], linear(x, weight))


@needs_numba
def test_it_is_numba_that_computes_them(always, numba_cache, monkeypatch):
    weight, x = torch.randn(6, 8), torch.randn(2, 8)
    with few_rows([weight], numba_cache), torch.inference_mode():
        monkeypatch.setattr(F, "linear", None)
        linear(x, weight)
        linear(x.T.contiguous().T, weight)  # what is no contiguous memory
        monkeypatch.undo()
    with torch.inference_mode():
        assert module._products == {}
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@needs_numba
def test_what_is_trained_or_computed_otherwise_goes_as_before(always, numba_cache):
    weight, x = torch.randn(6, 8), torch.randn(2, 8, requires_grad=True)
    with few_rows([weight], numba_cache):
        linear(x, weight).sum().backward()
        assert torch.allclose(x.grad, weight.sum(dim=0).expand(2, -1))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        with torch.inference_mode():
            assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
            assert linear(x[:0], weight).shape == (0, 6)


def test_without_numba_torch_computes(monkeypatch, numba_cache):
    monkeypatch.setattr(module, "_known", [])
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    weight, x = torch.randn(6, 8), torch.randn(2, 8)
    with few_rows([weight], numba_cache), torch.inference_mode():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@needs_numba
def test_how_many_rows_it_pays_for_is_measured_once(monkeypatch, numba_cache):
    monkeypatch.setattr(module, "_known", [])
    weights = [torch.randn(64, 64) for _ in range(3)]
    with few_rows(weights, numba_cache):
        [known] = module._known
    assert known[0] in (0, *module.TRIED)
    with few_rows(weights, numba_cache):
        assert module._known == [known]


@needs_numba
@pytest.mark.parametrize("features", [1, 5, 48])
@pytest.mark.parametrize("columns", [1, 7, 577])
def test_numbers_of_bfloat16_are_read_in_it_and_give_the_same(always, numba_cache, features, columns):
    weight = torch.randn(features, columns).bfloat16().float()
    narrow = in_bfloat16(weight)
    assert narrow.dtype == torch.bfloat16
    with few_rows([weight], numba_cache, lambda: {id(weight): narrow}), torch.inference_mode():
        weight.fill_(float("nan"))  # it is the other that is read
        for rows in (1, 4, 6):
            x = torch.randn(rows, columns)
            wanted = F.linear(x.double(), narrow.double())
            assert torch.allclose(linear(x, weight).double(), wanted, atol=2e-5 * columns**0.5)


@pytest.mark.parametrize("odd", [1 / 3, float("nan"), 1e-45])
@pytest.mark.parametrize("place", [0, -1])
def test_a_number_that_would_be_rounded_is_found_wherever_it_is(odd, place):
    weight = torch.randn(100, 100).bfloat16().float()
    assert torch.equal(in_bfloat16(weight).float(), weight)
    weight.view(-1)[place] = odd
    assert in_bfloat16(weight) is None
