from __future__ import annotations

import pytest
import torch
from torch import nn

import rankfold.lora.layers.linear
from conftest import randomise, tiny_llama
from held import FORM_NAMES, hold_all
from rankfold import LoraConfig, PeftModel, dequantise, get_peft_model
from rankfold.errors import AdapterError, ConfigError, MergeError, TargetError
from rankfold.lora.files.fingerprint import compare, fingerprint
from rankfold.lora.layers.packed import LoraHeldLinear
from rankfold.storage.forms import INT8
from rankfold.storage.layers import HeldLinear, held_layers, hold

EVERY = pytest.mark.parametrize("name", FORM_NAMES)
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"]}


def net(name: str) -> nn.Sequential:
    """An embedding and a linear layer whose weights are held as ``name``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 256), nn.Linear(256, 6))
    hold_all(model, name)
    return model


def expanded(model: nn.Sequential) -> nn.Sequential:
    """The plain layers with the same numbers."""
    plain = nn.Sequential(nn.Embedding(7, 256), nn.Linear(256, 6))
    with torch.no_grad():
        for ours, layer in zip(plain, model, strict=True):
            ours.weight.copy_(layer.expanded_weight())
        plain[1].bias.copy_(model[1].bias)
    return plain


def adapted(model: nn.Module, **options) -> PeftModel:
    wrapped = get_peft_model(model, LoraConfig(**CONFIG | options))
    randomise(wrapped)
    return wrapped.train()


def outputs_and_gradients(model: PeftModel, ids: torch.Tensor) -> list[torch.Tensor]:
    out = model(ids)
    out.square().mean().backward()
    return [out, *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 6], [5, 5, 3, 1]])


@EVERY
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": False}])
def test_outputs_and_gradients_are_those_of_adapters_on_the_expanded_weights(name, options, ids):
    held = net(name)
    plain = adapted(expanded(held), **options)
    mine = outputs_and_gradients(adapted(held, **options), ids)
    theirs = outputs_and_gradients(plain, ids)
    assert len(mine) == (7 if "use_dora" in options else 5)
    for ours, other in zip(mine, theirs, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


def test_the_gradient_of_the_input_goes_through_held_layers():
    layer, x = net("Q4_1")[1], torch.randn(3, 256, requires_grad=True)
    model = adapted(nn.Sequential(layer), target_modules=["0"])
    model(x).sum().backward()
    weight = layer.expanded_weight() + layer.delta("default").detach()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_the_layer_is_the_same_object_with_added_keys_and_goes_back():
    model = net("Q4_0")
    layer, before, kind = model[1], list(model.state_dict()), type(model[1])
    wrapped = adapted(model)
    assert model[1] is layer
    assert isinstance(layer, HeldLinear)
    assert type(layer).__name__ == "LoraHeldLinear"
    assert [key for key in model.state_dict() if "lora_" not in key] == before
    assert wrapped.unload() is model
    assert type(model[1]) is kind


def test_all_linear_means_held_layers_too():
    model = get_peft_model(net("Q4_0"), LoraConfig(r=2, target_modules="all-linear"))
    assert model.targeted_module_names == ["1"]


def test_held_weights_are_counted_as_numbers_and_shared_ones_once():
    model = tiny_llama(tied=True)
    plain = sum(p.numel() for p in model.parameters())
    layers = [m for m in model.modules() if type(m) is nn.Linear and m is not model.lm_head]
    hold_all(nn.ModuleList(layers), "INT8")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert total - trainable == plain


def test_a_merge_is_refused_by_name_and_exact_after_dequantising(ids):
    model = adapted(net("Q5_1")).eval()
    wanted = model(ids)
    with pytest.raises(MergeError, match=r"its weight is held as Q5_1.*dequantise\(model\) first"):
        model.merge_adapter()
    assert dequantise(model) is model
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert [type(layer) for layer in merged] == [nn.Embedding, nn.Linear]
    torch.testing.assert_close(merged(ids), wanted, rtol=1e-4, atol=1e-4)


def test_dequantising_keeps_shared_weights_shared_and_takes_the_other_weights_dtype():
    model = tiny_llama(tied=True)
    embedding, head = model.get_input_embeddings(), model.lm_head
    hold_all(nn.ModuleList([embedding]), "INT8")
    hold(head, INT8, embedding.weight)
    ids = torch.randint(0, 49152, (1, 5))
    wanted = model(ids).logits
    dequantise(model)
    assert head.weight is embedding.weight
    assert head.weight.dtype == torch.float32
    assert not held_layers(model)
    torch.testing.assert_close(model(ids).logits, wanted)


def test_files_go_from_held_to_expanded_bases_and_back(ids, tmp_path):
    """Blocks are exactly the numbers that they expand to, so the fingerprint is the same."""
    held, plain = net("Q4_0"), expanded(net("Q4_0"))
    assert fingerprint(held) == fingerprint(plain)
    model = adapted(held).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_the_fingerprint_tells_other_blocks_and_is_not_compared_with_rounded_numbers():
    assert fingerprint(net("Q4_0")) != fingerprint(net("Q4_1"))
    problem, unchecked = compare(fingerprint(net("BF16")), fingerprint(net("INT8")))
    assert problem is None
    assert "INT8" in unchecked


def test_another_base_of_the_same_form_is_refused_on_loading(tmp_path):
    adapted(net("Q4_0")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the weights differ"):
        PeftModel.from_pretrained(net("Q4_1"), tmp_path, allow=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa", "target_modules": ["1"]}, "changes the base weight"),
        ({"modules_to_save": ["1"], "target_modules": ["0"]}, "1 .HeldLinear. holds weights in few bytes"),
        (
            {"trainable_token_indices": {"0": [1]}, "target_modules": ["1"]},
            "not an embedding or a linear layer",
        ),
    ],
)
def test_what_would_train_or_change_held_weights_is_refused_by_name(options, message):
    with pytest.raises((ConfigError, TargetError), match=message):
        get_peft_model(net("Q4_0"), LoraConfig(**CONFIG | options))


def test_a_rank_beyond_a_held_weight_is_told_of():
    with pytest.warns(UserWarning, match="rank exceeds.*\n.*1: rank 7 on a "):
        get_peft_model(net("Q4_0"), LoraConfig(**CONFIG | {"r": 7, "target_modules": ["1"]}))


def test_half_precision_bases_get_float32_factors():
    model = get_peft_model(net("Q8_0").to(torch.bfloat16), LoraConfig(**CONFIG))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


@EVERY
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_input_goes_the_fused_way_with_the_same_result(name, dropout, autocast, monkeypatch):
    """As layers on the expanded weights go it: the same mask, the same products."""
    calls, real = [], rankfold.lora.layers.linear.fused_linear
    monkeypatch.setattr(rankfold.lora.layers.linear, "fused_linear", lambda *a: calls.append(a) or real(*a))
    held, upstream = net(name)[1], torch.randn(160, 6)
    plain = nn.Linear(256, 6)
    plain.weight, plain.bias = nn.Parameter(held.expanded_weight(), requires_grad=False), held.bias
    results = []
    for layer in (held, plain):
        options = {"target_modules": ["0"], "lora_dropout": dropout}
        model = adapted(nn.Sequential(layer), **options)
        torch.manual_seed(1)
        x = torch.randn(160, 256, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if autocast and layer is plain:
                model.get_base_model()[0].weight.data = layer.weight.data.bfloat16()
            out = model(x)
        out.backward(upstream.to(out.dtype))
        results.append([out.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)])
    assert [type(a[1][0]) for a in calls] == [LoraHeldLinear, nn.Parameter]
    for ours, other in zip(*results, strict=True):
        assert ours.dtype == other.dtype
        size = float(other.abs().max())
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=(2e-2 if autocast else 1e-5) * size)


def test_the_fused_way_can_be_differentiated_twice():
    model = adapted(nn.Sequential(net("Q4_1")[1]), target_modules=["0"])
    x = torch.randn(160, 256, requires_grad=True)
    twice = []
    for threshold in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rankfold.lora.layers.linear, "FUSED_FROM", threshold)
            (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            twice.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-4 * float(twice[1].abs().max()))
