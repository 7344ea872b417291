"""The layer's way through one autograd function, which only large inputs take."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankfold.lora.layers.linear
from conftest import randomise
from rankfold import LoraConfig
from rankfold.kernels.dropout import DropMask
from rankfold.lora.layers.linear import FUSED_FROM, LoraLinear

D_IN, D_OUT = 64, 48
OPTIONS = {"r": 4, "lora_alpha": 12, "target_modules": ["0"]}


def net(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT, dtype=dtype, **options))


def adapted(library=rankfold, base: nn.Module | None = None, **options) -> nn.Module:
    given = net() if base is None else base
    model = library.get_peft_model(given, library.LoraConfig(**OPTIONS | options))
    randomise(model)
    return model.train()


def sample(rows: int = FUSED_FROM // D_IN, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, rows // 2, D_IN, generator=torch.Generator().manual_seed(5)).to(dtype)


def step(model, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    trained = [p.grad.clone() for n, p in model.named_parameters() if "lora_" in n or p.grad is not None]
    return out.detach(), [x.grad, *trained]


@pytest.fixture
def calls(monkeypatch) -> list[DropMask | None]:
    """The masks of the fused calls."""
    found, real = [], rankfold.lora.layers.linear.fused_linear

    def counted(x, base, factors, scale, mask, up):
        found.append(mask)
        return real(x, base, factors, scale, mask, up)

    monkeypatch.setattr(rankfold.lora.layers.linear, "fused_linear", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "with_bias"),
    [*((o, b) for o in ({}, {"use_rslora": True}) for b in (True, False)), ({"bias": "lora_only"}, True)],
    ids=str,
)
def test_a_large_input_gives_pefts_output_and_gradients(options, dtype, with_bias, calls):
    base = net(dtype, bias=with_bias)
    mine, theirs = (adapted(lib, copy.deepcopy(base), **options) for lib in (rankfold, peft))
    x = sample(dtype=dtype)
    out, found = step(mine.to(dtype), x)
    expected_out, expected = step(theirs.to(dtype), x)
    assert calls == [None]
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), expected_out)


def test_dropout_gives_pefts_output_and_gradients_where_peft_drops_the_same(calls):
    mine, theirs, x = adapted(lora_dropout=0.3), adapted(peft, lora_dropout=0.3), sample()
    out, found = step(mine, x)
    mask = calls[0]

    class Same(nn.Module):
        def forward(self, x):
            return x * mask.expand(x) * mask.rescale

    theirs.base_model.model[0].lora_dropout["default"] = Same()
    expected_out, expected = step(theirs, x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_follows_torchs_seed_and_the_module_and_falls_in_training_only(calls):
    model, x = adapted(lora_dropout=0.3), sample()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    layer = model.get_base_model()[0]
    layer.lora_dropout["default"].p = 0.75
    model(x)
    assert calls[-1].kept == 1 << 14
    state = torch.get_rng_state()
    model.eval()(x)
    assert calls[-1] is None
    assert torch.equal(torch.get_rng_state(), state)


def two_adapters() -> nn.Module:
    model = adapted()
    model.add_adapter("second", LoraConfig(**OPTIONS))
    model.set_adapter(["default", "second"])
    return model


def half_frozen() -> nn.Module:
    base = net(torch.bfloat16)
    return adapted(base=base)


OTHERS = [
    lambda: adapted(use_dora=True),
    lambda: adapted(lora_bias=True),
    two_adapters,
    half_frozen,
]


@pytest.mark.parametrize("build", OTHERS, ids=["dora", "lora_bias", "two adapters", "two dtypes"])
def test_other_layers_go_the_way_of_separate_operations(build, calls):
    model = build()
    model(sample(dtype=model.get_base_model()[0].weight.dtype))
    assert calls == []


def test_small_inputs_and_replaced_dropouts_do_too(calls):
    model = adapted(lora_dropout=0.3)
    model(sample(FUSED_FROM // D_IN - 2))
    layer = model.get_base_model()[0]
    for other in (nn.AlphaDropout(0.3), nn.Dropout(1.0), nn.Dropout(0.0)):
        layer.lora_dropout["default"] = other
        model(sample())
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own use of it in jvp
def test_autocast_and_functorch_get_what_they_get_from_separate_operations(calls):
    model, x = adapted(), sample()
    layer = model.get_base_model()[0]
    expected = layer(x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, expected - layer.bias)
    assert calls == []


def test_switching_off_merging_and_exchanged_factors_are_followed(calls):
    model, x = adapted(), sample()
    layer = model.get_base_model()[0]
    assert type(layer) is LoraLinear
    out = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert len(calls) == 1
    model.merge_adapter()
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), out)
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(D_OUT, 4))
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_second_derivative_is_that_of_separate_operations(calls, monkeypatch):
    model, x = adapted().double(), sample(dtype=torch.float64)

    def penalty() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return list(
            torch.autograd.grad(slope.square().sum(), [p for p in model.parameters() if p.requires_grad])
        )

    found = penalty()
    assert calls == [None]
    monkeypatch.setattr(rankfold.lora.layers.linear, "FUSED_FROM", 1 << 40)
    torch.testing.assert_close(found, penalty())
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_drops_the_same_again(reentrant, calls):
    model, x = adapted(lora_dropout=0.3), sample()
    torch.manual_seed(5)
    expected = step(model, x)
    torch.manual_seed(5)
    again = step(Checkpointed(model, reentrant), x)
    assert len(calls) == 3
    torch.testing.assert_close(again, expected)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_a_keeps_the_narrow_product_alone(dropout, calls):
    """LoRA-FA: the layer's input is not kept for the backward."""
    kept: list[Tensor] = []
    models = [adapted(lora_dropout=dropout), adapted(lora_dropout=dropout)]
    for name, parameter in models[0].named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    x = sample()
    found = []
    for model in models:
        torch.manual_seed(2)
        given = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = model(given)
        if model is models[0]:
            assert calls
            assert not any(tensor.numel() == x.numel() for tensor in kept)
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
        found.append((out.detach(), given.grad, *grads.values()))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
    assert any(tensor.numel() == x.numel() for tensor in kept)


def test_a_frozen_a_has_no_second_derivative():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    x = sample().requires_grad_()
    with pytest.raises(rankfold.RankfoldError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
