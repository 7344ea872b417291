from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from held import FORM_NAMES, random_held
from rankfold.errors import ModelError
from rankfold.kernels.cross_entropy import linear_cross_entropy
from rankfold.storage.forms import FORMS
from rankfold.storage.layers import HeldEmbedding, HeldLinear, can_hold, hold

EVERY = pytest.mark.parametrize("name", FORM_NAMES)


def linear(name: str = "Q4_0", bias: bool = True) -> HeldLinear:
    return hold(nn.Linear(256, 6, bias=bias), FORMS[name], random_held(name, 6, 256))


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_stays_the_object_it_was_and_computes_with_the_numbers(name, bias):
    layer = nn.Linear(256, 6, bias=bias)
    assert hold(layer, FORMS[name], random_held(name, 6, 256)) is layer
    assert isinstance(layer, nn.Linear)
    assert [key for key, _ in layer.state_dict().items()] == (["weight", "bias"] if bias else ["weight"])
    assert not layer.weight.requires_grad
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), F.linear(x, layer.expanded_weight(), layer.bias))


@EVERY
def test_an_embedding_gives_the_rows_of_the_numbers(name):
    layer = hold(nn.Embedding(9, 256), FORMS[name], random_held(name, 9, 256))
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    assert torch.equal(layer(ids), layer.expanded_weight()[ids])
    with pytest.raises(IndexError):
        layer(torch.tensor([9]))


def test_the_bytes_may_be_shared_and_a_layer_may_be_without_memory_before():
    shared = nn.Parameter(random_held("Q8_0", 9, 64), requires_grad=False)
    head = hold(nn.Linear(64, 9, bias=False, device="meta"), FORMS["Q8_0"], shared)
    embedding = hold(nn.Embedding(9, 64, device="meta"), FORMS["Q8_0"], shared)
    assert head.weight is embedding.weight
    assert head(embedding(torch.arange(9))).shape == (9, 9)


def test_another_dtype_changes_what_is_computed_in_and_not_what_is_held():
    layer, embedding = linear(), hold(nn.Embedding(4, 32), FORMS["Q4_0"], random_held("Q4_0", 4, 32))
    before = layer.weight.clone()
    layer.to(torch.bfloat16), embedding.to(torch.bfloat16)
    assert torch.equal(layer.weight, before)
    assert layer(torch.randn(2, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype():
    layer = linear()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 256))
    assert out.dtype == torch.bfloat16


def test_a_copy_and_a_state_dict_hold_the_same_bytes():
    layer, x = linear(), torch.randn(2, 256)
    other = linear("Q4_0")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert copy.deepcopy(layer).form == layer.form
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Linear(256, 6).state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_a_compiled_layer_is_whole_and_computes_the_same():
    torch._dynamo.reset()
    layer, x = linear(), torch.randn(2, 256, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    grad, x.grad = x.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 1),
        nn.Embedding(4, 32, max_norm=1.0),
        nn.modules.linear.NonDynamicallyQuantizableLinear(32, 4),
    ],
    ids=["another kind", "max_norm", "a subclass"],
)
def test_a_layer_that_reads_its_weight_as_numbers_is_refused(layer):
    assert not can_hold(layer)
    with pytest.raises(ModelError, match=f"a {type(layer).__name__} cannot hold its weight as Q4_0"):
        hold(layer, FORMS["Q4_0"], random_held("Q4_0", 4, 32))


def test_bytes_for_another_number_of_rows_are_refused():
    layer = nn.Linear(32, 5)
    with pytest.raises(ModelError, match="has 5 rows; got 4 held as Q4_0"):
        hold(layer, FORMS["Q4_0"], random_held("Q4_0", 4, 32))
    assert type(layer) is nn.Linear


def test_what_is_held_is_shown():
    assert repr(linear()) == "HeldLinear(in_features=256, out_features=6, bias=True, held=Q4_0)"
    assert "held=Q4_0" in repr(hold(nn.Embedding(4, 32), FORMS["Q4_0"], random_held("Q4_0", 4, 32)))
    assert issubclass(HeldEmbedding, nn.Embedding)


@pytest.mark.parametrize("bias", [True, False])
def test_losses_behind_a_held_head_are_those_of_the_numbers(bias):
    layer = linear("Q8_0", bias).requires_grad_(False)
    hidden = torch.randn(7, 256).requires_grad_()
    targets = torch.tensor([0, 5, 4, 2, 3, 5, 1])
    found = linear_cross_entropy(hidden, layer, targets, layer.bias, chunk_tokens=2)
    (ours,) = torch.autograd.grad(found.sum(), hidden)
    logits = F.linear(hidden, layer.expanded_weight(), layer.bias)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    (theirs,) = torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
