from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import rankfold.kernels.dropout
from rankfold.kernels.dropout import DropMask
from rankfold.kernels.fused_linear import can_fuse, fused_linear

sizes = st.integers(1, 6)
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")
MASK = DropMask(11, 40_000)


def tensors(
    shape: tuple[int, ...] = (3, 4), d_out: int = 5, rank: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (shape, (d_out, shape[-1]), (d_out,), (rank, shape[-1]), (d_out, rank))
    made = [torch.randn(one, generator=generator, dtype=torch.float64).to(dtype) for one in shapes]
    return dict(zip(NAMES, made, strict=True))


def fused(x, weight, bias, lora_a, lora_b, mask=None) -> Tensor:
    return fused_linear(x, (weight, bias), (lora_a, lora_b), 0.7, mask)


def plain(x, weight, bias, lora_a, lora_b, mask=None) -> Tensor:
    seen = x if mask is None else x * mask.expand(x) * mask.rescale
    return F.linear(x, weight, bias) + 0.7 * F.linear(F.linear(seen, lora_a), lora_b)


def fused_gated(up, mask=None, **given) -> Tensor:
    pair, factors = (given["weight"], given["bias"]), (given["lora_a"], given["lora_b"])
    return fused_linear(given["x"], pair, factors, 0.7, mask, up)


def plain_gated(x, up, **given) -> Tensor:
    return plain(F.silu(x) * up, **given)


def with_up(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """``given`` with a tensor like x, by which silu(x) is multiplied."""
    return given | {"up": torch.randn_like(given["x"].double()).to(given["x"].dtype)}


def gradients(function, given: dict[str, Tensor], trained, mask) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in given.items()}
    out = function(**leaves, mask=mask)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return out.detach(), {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "dropout"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0, 4)], ids=str)
def test_its_derivatives_are_right_and_so_are_theirs(shape, mask):
    given = [value.requires_grad_() for value in tensors(shape).values()]
    assert torch.autograd.gradcheck(lambda *each: fused(*each, mask), given)
    assert torch.autograd.gradgradcheck(lambda *each: fused(*each, mask), given)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    sizes,
    sizes,
    sizes,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sampled_from([None, MASK]),
)
def test_output_and_gradients_are_those_of_the_separate_operations(  # noqa: PLR0913, PLR0917
    batch, d_in, d_out, rank, dtype, trained, mask
):
    given = tensors((*batch, d_in), d_out, rank, dtype)
    out, found = gradients(fused, given, trained, mask)
    expected_out, expected = gradients(plain, {n: v.double() for n, v in given.items()}, trained, mask)
    assert found.keys() == expected.keys() == trained
    close = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, expected_out.to(dtype), **close)
    for name, value in found.items():
        assert (value.dtype, value.is_contiguous()) == (dtype, True)
        torch.testing.assert_close(value, expected[name].to(dtype), **close)


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "dropout"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0, 4)], ids=str)
def test_the_derivatives_through_a_gate_are_right_and_so_are_theirs(shape, mask):
    given = {name: value.requires_grad_() for name, value in with_up(tensors(shape)).items()}

    def called(*each):
        return fused_gated(**dict(zip(given, each, strict=True)), mask=mask)

    assert torch.autograd.gradcheck(called, [*given.values()])
    assert torch.autograd.gradgradcheck(called, [*given.values()])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    sizes,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sets(st.sampled_from([*NAMES, "up"]), min_size=1),
    st.sampled_from([None, MASK]),
)
def test_a_gated_input_gives_what_the_separate_operations_do(batch, d_in, dtype, trained, mask):
    given = with_up(tensors((*batch, d_in), 5, 2, dtype))
    out, found = gradients(fused_gated, given, trained, mask)
    expected_out, expected = gradients(plain_gated, {n: v.double() for n, v in given.items()}, trained, mask)
    assert found.keys() >= trained
    close = {"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, expected_out.to(dtype), **close)
    for name in trained:
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], expected[name].to(dtype), **close)


def test_of_a_gated_input_gate_and_up_are_kept_and_nothing_made_of_them():
    given = with_up(tensors((40, 30), 20, 2, torch.float32))
    for name in ("x", "up", "lora_a"):
        given[name].requires_grad_()
    inputs = {value.untyped_storage().data_ptr() for value in given.values()}
    kept = kept_bytes(lambda: fused_gated(**given))
    assert sum(size for place, size in kept.items() if place not in inputs) == 2 * 40 * 4


def test_dropout_works_through_many_rows_block_by_block(monkeypatch):
    monkeypatch.setattr(rankfold.kernels.dropout, "BLOCK", 32)
    given = tensors((37, 4))
    found, expected = (gradients(function, given, NAMES, MASK) for function in (fused, plain))
    torch.testing.assert_close(found, expected)


def test_inputs_and_gradients_may_lie_in_memory_as_they_like():
    given = tensors((3, 2, 4)) | {"x": torch.randn(4, 3, 2, dtype=torch.float64).permute(1, 2, 0)}
    found = []
    for function in (fused, plain):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        function(**leaves).sum().backward()  # a gradient of one number, expanded
        found.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*found)


def kept_bytes(call) -> dict[int, int]:
    """The storages that a call keeps for backward, by place, with their sizes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "dropout"])
def test_nothing_is_kept_but_the_inputs_and_the_narrow_product(mask):
    given = tensors((40, 30), 20, 2, torch.float32)
    given["lora_a"].requires_grad_()
    inputs = {value.untyped_storage().data_ptr() for value in given.values()}
    kept = kept_bytes(lambda: fused(**given, mask=mask))
    assert sum(size for place, size in kept.items() if place not in inputs) == 2 * 40 * 4


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["wide x", "narrow x"])
def test_under_autocast_products_are_in_the_weights_dtype_and_gradients_in_their_own(dtype, x_dtype, mask):
    given = tensors((7, 24), 20, 4, torch.float32)
    given |= {name: given[name].to(dtype) for name in ("weight", "bias")}
    given["x"] = given["x"].to(x_dtype or dtype)
    trained = ("x", "lora_a", "lora_b")
    with torch.autocast("cpu", dtype):
        assert can_fuse(*(given[name] for name in ("x", "weight", "lora_a", "lora_b")))
        out, found = gradients(fused, given, trained, mask)
    exact_out, exact = gradients(plain, {n: v.double() for n, v in given.items()}, trained, mask)
    assert out.dtype == dtype
    for name, value in {"out": out, **found}.items():
        wanted = exact_out if name == "out" else exact[name]
        assert value.dtype == (dtype if name == "out" else given[name].dtype)
        off = (value.double() - wanted).norm() / wanted.norm()
        assert off < 4 * torch.finfo(dtype).eps


def test_an_input_changed_before_backward_is_an_error():
    given = tensors()
    given["lora_a"].requires_grad_()
    out = fused(**given)
    given["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


GIVEN = tensors(dtype=torch.float32)


def ask(**changed) -> bool:
    given = GIVEN | changed
    return can_fuse(given["x"], given["weight"], given["lora_a"], given["lora_b"])


JIT_IS_OLD = "ignore:.*torch.jit.*:DeprecationWarning"  # torch's own use of it in jvp


@pytest.mark.filterwarnings(JIT_IS_OLD)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage.*:UserWarning")
def test_what_cannot_be_fused_is_known():
    assert ask()
    assert not ask(lora_a=torch.randn(2, 4, dtype=torch.float64))
    assert not ask(x=torch.randn(3, 4).to_sparse())
    assert not ask(x=torch.nested.nested_tensor([torch.randn(2, 4)]))
    assert not ask(x=torch.empty(3, 4, device="meta"), weight=GIVEN["weight"].bfloat16())
    assert not ask(x=torch.nn.Parameter(torch.randn(3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not ask()  # the product with a float32 weight is bfloat16
        assert ask(weight=GIVEN["weight"].bfloat16())
        assert not ask(weight=GIVEN["weight"].bfloat16(), x=GIVEN["x"].double())
    with torch.autograd.forward_ad.dual_level():
        assert not ask()
    seen = []
    torch.func.vmap(lambda x: seen.append(ask(x=x)) or x)(torch.randn(2, 3, 4))
    torch.func.grad(lambda x: seen.append(ask(x=x)) or x.sum())(torch.randn(3, 4))
    assert seen == [False, False]
