"""The chunked loss against torch's own on whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rankfold.kernels.cross_entropy import LossForm, head_cross_entropy, linear_cross_entropy

FORMS = [
    LossForm(),
    LossForm(scale=0.125),
    LossForm(softcap=3.0),
    LossForm(label_smoothing=0.1),
    LossForm(scale=1.5, softcap=2.0, label_smoothing=0.3),
]


def whole(hidden, weight, targets, bias=None, form=FORMS[0]):
    """By the formulas of transformers' own models, on all logits at once."""
    logits = F.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide) * form.scale
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=form.label_smoothing)


def inputs(tokens, width, vocabulary, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return random(tokens, width), random(vocabulary, width), targets, random(vocabulary)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["hidden", "hidden, weight", "hidden, weight, bias"])
def test_gradients_are_those_of_finite_differences(form, trained):
    hidden, weight, targets, bias = inputs(7, 3, 5)
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        tensor.requires_grad_(name in trained)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, form, chunk_tokens=3),
        (hidden, weight, bias),
    )


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 30)),
    chunk=st.integers(1, 25),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(FORMS),
    trained=st.sampled_from(["", "weight", "weight, bias"]),
)
def test_losses_and_gradients_are_torchs_own(sizes, chunk, dtype, form, trained):
    """Every token has a weight of its own in the sum, as in preference losses."""
    found, wanted = [], []
    for result in (found, wanted):
        hidden, weight, targets, bias = inputs(*sizes, dtype)
        leaves = [hidden, *([weight] if trained else []), *([bias] if "bias" in trained else [])]
        for leaf in leaves:
            leaf.requires_grad_()
        if result is found:
            losses = linear_cross_entropy(hidden, weight, targets, bias, form, chunk)
        else:
            losses = whole(hidden, weight, targets, bias, form)
        upstream = torch.linspace(-1, 2, sizes[0], dtype=losses.dtype)
        result += [losses.detach(), *torch.autograd.grad(losses, leaves, upstream)]
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    for got, expected in zip(found, wanted, strict=True):
        tolerance = 16 * torch.finfo(dtype).eps
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


def test_logits_far_beyond_the_range_of_exp_give_finite_losses():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
    losses = linear_cross_entropy(hidden, weight, targets)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2000.0]
    assert hidden.grad.flatten().tolist() == [0.0, -2.0]


def test_a_number_that_is_not_finite_shows_in_the_loss_of_its_token_alone():
    hidden, weight, targets, _ = inputs(3, 2, 4, torch.float32)
    hidden[1, 0] = math.nan
    assert linear_cross_entropy(hidden, weight, targets, chunk_tokens=3).isfinite().tolist() == [
        True,
        False,
        True,
    ]


def test_a_head_of_any_kind_gets_the_gradients_of_whole_logits():
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 11)).double() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    found = []
    for head, chunked in zip(heads, (True, False), strict=True):
        hidden, _, targets, _ = inputs(9, 6, 11)
        hidden.requires_grad_()
        if chunked:
            losses = head_cross_entropy(hidden, head, targets, FORMS[4], chunk_tokens=4)
        else:
            losses = whole(head(hidden), torch.eye(11, dtype=torch.float64), targets, None, FORMS[4])
        losses.sum().backward()
        found.append([losses.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_head_with_dropout_draws_the_same_again_in_the_backward():
    torch.manual_seed(0)
    hidden = torch.randn(8, 400, requires_grad=True)
    dropped = []

    def head(some):
        dropped.append(F.dropout(some, 0.5))
        return dropped[-1][:, :20]

    head_cross_entropy(hidden, head, torch.zeros(8, dtype=torch.long), chunk_tokens=4).sum().backward()
    assert torch.equal(torch.cat(dropped[:2]), torch.cat([dropped[3], dropped[2]]))


def test_no_tensor_holds_more_logits_than_one_chunk():
    hidden, weight, targets, _ = inputs(64, 4, 100, torch.float32)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    for trained in (False, True):
        hidden.grad = None
        with Sizes():
            linear_cross_entropy(
                hidden.requires_grad_(), weight.requires_grad_(trained), targets, chunk_tokens=8
            ).sum().backward()
        assert largest == 8 * 100
