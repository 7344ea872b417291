from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError
from rankfold.lora.layers.attention import LoraMultiheadAttention, LoraOutProjection
from rankfold.lora.placing.placement import remove

OPTIONS = {"r": 3, "lora_alpha": 6, "target_modules": ["attn"]}
WIDTH = 8
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, 2, **options)
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        return self.attn(query, key, key if value is None else value, **options)


def sample(dtype=torch.float32, seed: int = 5, length: int = 4) -> torch.Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ours(net: nn.Module, **options) -> PeftModel:
    model = get_peft_model(net, LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def pefts(net: nn.Module, **options) -> nn.Module:
    model = peft.get_peft_model(net, peft.LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def dense(net: Net, model: PeftModel) -> Net:
    """``net``, plain, with the updates of ``model`` in its weights."""
    plain, attn = copy.deepcopy(net), model.get_base_model().attn
    with torch.no_grad():
        for weight, layer, scale in (
            (plain.attn.in_proj_weight, attn, 2.0),
            (plain.attn.out_proj.weight, attn.out_proj, 4.0),  # PEFT adds out_proj's update twice
        ):
            lora_a, lora_b = layer.factors("default")
            weight.add_((scale * lora_b @ lora_a).to(weight.dtype))
    return plain


CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, False, True], [False, True, True, True]])
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    {"attn_mask": CAUSAL},
    {"attn_mask": CAUSAL.float() * -1e9},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False},
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call) or "plain")
@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}], ids=str
)
def test_the_output_is_that_of_the_dense_weights(options, call, grad):
    net = Net(**options).double().eval()
    plain = copy.deepcopy(net)
    x = sample(torch.float64)
    x = x if options.get("batch_first") else x.transpose(0, 1)
    call = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()
    }
    model = ours(net)
    with torch.set_grad_enabled(grad):
        found, expected = model(x, **call), dense(plain, model)(x, **call)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], plain(x, **call)[0])


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.5}, {"batch_first": True}],
    ids=str,
)
def test_cross_attention_and_the_rarer_options_work(options):
    net = Net(**options).double().eval()
    plain, model = copy.deepcopy(net), ours(net)
    inputs = [sample(torch.float64, seed) for seed in (1, 2, 3)]
    torch.testing.assert_close(model(*inputs), dense(plain, model)(*inputs))


@NESTED
def test_unbatched_and_nested_inputs_work():
    net = Net(batch_first=True).eval()
    plain, model = copy.deepcopy(net), ours(net)
    torch.testing.assert_close(model(sample()[0]), dense(plain, model)(sample()[0]))
    nested = torch.nested.nested_tensor([sample()[0], sample()[1, :2]])
    with torch.no_grad():
        found, expected = (m(nested, need_weights=False)[0] for m in (model, dense(plain, model)))
    torch.testing.assert_close(found.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


@pytest.mark.parametrize("options", [{"batch_first": True}, {}], ids=str)
@pytest.mark.peft("`nn.MultiheadAttention`", "same", "same")
def test_files_pass_between_peft_and_rankfold(options, tmp_path):
    mine, x = ours(Net(**options)), sample()
    mine.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.attn."): tuple(t.shape) for key, t in tensors.items()} == {
        "lora_A.weight": (3, WIDTH),
        "lora_B.weight": (3 * WIDTH, 3),
        "base_layer.out_proj.lora_A.weight": (3, WIDTH),
        "base_layer.out_proj.lora_B.weight": (WIDTH, 3),
    }
    loaded = peft.PeftModel.from_pretrained(Net(**options), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), mine(x))
    assert not torch.allclose(Net(**options)(x)[0], mine(x)[0])
    theirs = pefts(Net(**options))
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(Net(**options), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))
    again.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    torch.testing.assert_close(again.merge_and_unload()(x), theirs.merge_and_unload()(x))


@pytest.mark.peft(
    "scale of the update on `out_proj` inside `nn.MultiheadAttention`",
    "counted twice",
    "PEFT's bug, followed: counted twice too, so that files mean the same; the layer's `scaling` says so",
)
def test_peft_adds_the_update_of_out_proj_twice():
    net = Net().double().eval()
    theirs, x = pefts(copy.deepcopy(net)), sample(torch.float64)
    layer = theirs.base_model.model.attn
    for times in (1, 2):
        plain = copy.deepcopy(net)
        with torch.no_grad():
            plain.attn.in_proj_weight += layer.get_delta_weight("default")
            plain.attn.out_proj.weight += times * layer.base_layer.out_proj.get_delta_weight("default")
        assert torch.allclose(plain(x)[0], theirs(x)[0]) == (times == 2)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_one_seed_gives_the_same_start_as_peft(init):
    mine, theirs = Net(), Net()
    for make, net, config in (
        (get_peft_model, mine, LoraConfig(**OPTIONS, init_lora_weights=init)),
        (peft.get_peft_model, theirs, peft.LoraConfig(**OPTIONS, init_lora_weights=init)),
    ):
        torch.manual_seed(7)
        make(net, config).add_adapter("second", config)
    for name in ("default", "second"):
        for factor in ("lora_A", "lora_B"):
            found = getattr(mine.attn, factor)[name].weight
            assert torch.equal(found, getattr(theirs.attn, factor)[name].weight)
            found = getattr(mine.attn.out_proj, factor)[name].weight
            assert torch.equal(found, getattr(theirs.attn.base_layer.out_proj, factor)[name].weight)


@pytest.mark.parametrize("training", [True, False])
def test_the_start_is_the_base_to_the_last_bit(training):
    net = Net(batch_first=True).train(training)
    expected = net(sample())
    model = get_peft_model(net, LoraConfig(**OPTIONS))
    for found, wanted in zip(model(sample()), expected, strict=True):
        assert torch.equal(found, wanted)


def test_gradients_reach_the_factors_and_are_those_of_the_dense_weights():
    net = Net(batch_first=True).double()
    plain = copy.deepcopy(net)
    model, x = ours(net), sample(torch.float64)
    twin = dense(plain, model)
    for network in (model, twin):
        network(x)[0].square().sum().backward()
    assert net.attn._parameters["in_proj_weight"].grad is None
    for layer, gradient, scale in (
        (net.attn, twin.attn.in_proj_weight.grad, 2.0),
        (net.attn.out_proj, twin.attn.out_proj.weight.grad, 4.0),
    ):
        lora_a, lora_b = layer.factors("default")
        torch.testing.assert_close(lora_a.grad, scale * lora_b.T @ gradient)
        torch.testing.assert_close(lora_b.grad, scale * gradient @ lora_a.T)


@pytest.mark.peft(
    "base weights of `nn.MultiheadAttention` over many calls",
    "merged and unmerged at each call: bf16 drifts",
    "never written",
)
def test_the_base_keeps_its_bits_over_many_calls_where_pefts_drifts():
    x = sample(torch.bfloat16)
    mine, theirs = ours(Net().bfloat16()), pefts(Net().bfloat16())
    for _ in range(20):
        mine(x)
        theirs(x)
    before = Net().bfloat16().attn
    attn, peft_attn = mine.attn, theirs.base_model.model.attn.base_layer
    assert torch.equal(attn.state_dict()["in_proj_weight"], before.in_proj_weight)
    assert torch.equal(attn.out_proj.state_dict()["weight"], before.out_proj.weight)
    assert (peft_attn.in_proj_weight != before.in_proj_weight).float().mean() > 0.01


def test_state_dict_parameters_and_casts_see_the_base():
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ours(net)
    state = net.state_dict()
    assert [key for key in state if "lora_" not in key] == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    names = dict(net.named_parameters())
    assert names["attn.in_proj_weight"] is net.attn._parameters["in_proj_weight"]
    assert not names["attn.in_proj_weight"].requires_grad
    net.load_state_dict(state | {"attn.in_proj_weight": torch.ones(3 * WIDTH, WIDTH)})
    assert net.attn._parameters["in_proj_weight"].min() == 1
    net.load_state_dict(state | before, assign=True)
    assert torch.equal(net.state_dict()["attn.in_proj_weight"], before["attn.in_proj_weight"])
    net.double()
    assert net.attn.in_proj_weight.dtype == net.attn.out_proj.weight.dtype == torch.float64
    assert (
        torch.func.functional_call(net, dict(net.named_parameters()), sample(torch.float64))[0].dtype
        == torch.float64
    )


def test_the_shown_weights_are_differentiable_and_the_base_when_disabled():
    net = Net()
    model = ours(net)
    attn = net.attn
    assert attn.in_proj_weight.requires_grad
    assert not torch.equal(attn.in_proj_weight, attn._parameters["in_proj_weight"])
    with model.disable_adapter():
        assert attn.in_proj_weight is attn._parameters["in_proj_weight"]
        assert torch.equal(model(sample())[0], Net()(sample())[0])
    x = sample()
    expected = nn.functional.linear(x, attn.out_proj.weight, attn.out_proj.bias)
    assert torch.equal(attn.out_proj(x), expected)


def test_nothing_is_kept_of_the_weights_after_a_call_that_fails():
    net = Net()
    ours(net)
    with pytest.raises(AssertionError):
        net(sample(), sample(seed=2, length=3), sample(seed=3, length=2))
    assert net.attn._shown == net.attn.out_proj._shown == {}
    net(sample())
    assert net.attn._shown == {}


def test_threads_do_not_disturb_each_other():
    model = ours(Net(batch_first=True)).eval()
    inputs = [sample(seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [model(x)[0] for x in inputs]

        def call(x):
            with torch.no_grad():
                return model(x)[0]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(call, inputs * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_output_to_the_bit_and_unmerging_the_weights(dtype):
    net = Net(batch_first=True).to(dtype).eval()
    before, x = copy.deepcopy(net.state_dict()), sample(dtype)
    model = ours(net)
    expected = model(x)[0]
    model.merge_adapter()
    assert torch.equal(model(x)[0], expected)
    changed = [key for key, value in before.items() if not torch.equal(net.state_dict()[key], value)]
    assert changed == ["attn.in_proj_weight", "attn.out_proj.weight"]
    model.unmerge_adapter()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    merged = model.merge_and_unload()
    assert torch.equal(merged(x)[0], expected)
    assert [type(module) for module in merged.modules()] == [type(module) for module in Net().modules()]


def test_a_merge_that_overflows_changes_neither_projection():
    net = Net().half()
    before = copy.deepcopy(net.state_dict())
    model = ours(net)
    with torch.no_grad():
        net.attn.out_proj.factors("default")[1].fill_(1e6)
    with pytest.raises(
        MergeError, match=r"attn.out_proj: NaNs detected in the merged weights.* in torch.float16"
    ):
        model.merge_adapter()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_restoring_gives_back_a_plain_layer():
    net = Net()
    plain = copy.deepcopy(net)
    remove(ours(net).get_base_model())
    assert type(net.attn) is nn.MultiheadAttention
    for found, expected in ((net.attn, plain.attn), (net.attn.out_proj, plain.attn.out_proj)):
        assert type(found) is type(expected)
        assert vars(found).keys() == vars(expected).keys()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net(sample())[0], plain(sample())[0])


def test_adapters_are_added_switched_summed_and_deleted():
    net = Net().double()
    plain, model, x = copy.deepcopy(net), ours(net), sample(torch.float64)
    model.add_adapter("second", LoraConfig(**OPTIONS))
    randomise(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    only_first = dense(plain, model)(x)
    torch.testing.assert_close(model(x), only_first)
    model.set_adapter("second")
    assert not torch.allclose(model(x)[0], only_first[0])
    model.set_adapter(["default", "second"])
    both = net.attn.delta("default") + net.attn.delta("second")
    torch.testing.assert_close(net.attn.in_proj_weight, plain.attn.in_proj_weight + both)
    model.delete_adapter("second")
    torch.testing.assert_close(model(x), only_first)
    assert list(net.attn.out_proj.lora_A) == list(net.attn.lora_A) == ["default"]


def test_a_copy_is_independent():
    net = Net()
    ours(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.attn.factors("default")[1].zero_()
    assert torch.equal(twin.attn.in_proj_weight, Net().attn.in_proj_weight)
    assert not torch.equal(net.attn.in_proj_weight, Net().attn.in_proj_weight)
    assert (type(twin.attn), type(twin.attn.out_proj)) == (LoraMultiheadAttention, LoraOutProjection)


def test_the_layer_compiles_whole():
    net = Net(batch_first=True).eval()
    model, x = ours(net), sample()
    expected = model(x)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize(
    "targets", [["self_attn"], ["linear1", "linear2"], ["self_attn", "linear1"]], ids=str
)
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoders_fast_path_does_not_pass_the_adapter_by(targets, padded):
    options = {"src_key_padding_mask": PADDING} if padded else {}
    x = sample()
    model = ours(encoder(), target_modules=targets)
    expected = copy.deepcopy(model).train()(x, **options)  # there is no fast path in training
    kept = ~PADDING if padded else torch.ones(3, 4, dtype=torch.bool)
    # Padding, autograd and adapters on the linear layers alone: torch refuses its own nested tensors there.
    for grad in (False,) if padded and "self_attn" not in targets else (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x, **options)[kept], expected[kept])
    assert not torch.allclose(encoder()(x)[kept], expected[kept], atol=1e-3)


@pytest.mark.parametrize("target", ["self_attn", "linear1"])
@pytest.mark.peft(
    "`nn.TransformerEncoderLayer` in eval mode", "the fast path passes the adapter by", "the adapter counts"
)
def test_pefts_adapter_has_no_effect_on_an_encoders_fast_path(target):
    theirs = pefts(encoder(), target_modules=[target]).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(sample()), encoder()(sample()))
    assert not torch.allclose(copy.deepcopy(theirs).train()(sample()), encoder()(sample()), atol=1e-3)


@pytest.mark.peft("DoRA on `nn.MultiheadAttention`", "refused", "works")
def test_dora_rescales_the_rows_of_both_projections():
    model = get_peft_model(Net(), LoraConfig(**OPTIONS, use_dora=True))
    x, plain = sample(), Net()
    torch.testing.assert_close(model(x), plain(x))  # at first it changes nothing
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    attention = model.get_base_model().attn
    changed = {}
    for layer, key in ((attention, "in_proj_weight"), (attention.out_proj, "weight")):
        weight = dict(plain.attn.named_parameters())[
            "in_proj_weight" if key != "weight" else "out_proj.weight"
        ]
        direction = (
            weight
            + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        magnitude = layer.lora_magnitude_vector["default"].weight
        changed[layer is attention] = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    with torch.no_grad():
        plain.attn.in_proj_weight.copy_(changed[True])
        plain.attn.out_proj.weight.copy_(changed[False])
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model(x)[0].sum().backward()
    assert attention.lora_magnitude_vector["default"].weight.grad is not None
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ({"kdim": 6, "vdim": 6}, {}, "attn: Only same embed for query/key/value"),
        ({}, {"init_lora_weights": "pissa"}, "attn: .*init_lora_weights='pissa' is for linear layers"),
        ({}, {"lora_bias": True}, "attn: lora_bias has no place in an attention layer"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused_and_left_alone(net, options, message):
    model = Net(**net)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**OPTIONS | options))
    assert type(model.attn) is nn.MultiheadAttention
    assert list(model.state_dict()) == list(Net(**net).state_dict())


def test_an_adapter_trained_by_peft_with_dropout_is_loaded_and_the_dropout_has_no_effect(tmp_path):
    theirs, x = pefts(Net(), lora_dropout=0.1).eval(), sample()
    theirs.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded.train()(x), theirs(x))


def test_an_out_projection_by_itself_takes_effect_although_only_its_weight_is_read():
    net, x = Net(), sample()
    before = net(x)[0]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["out_proj"]))
    assert torch.equal(model(x)[0], before)
    randomise(model)
    adapted = model(x)[0]
    assert not torch.allclose(adapted, before, atol=1e-3)
    adapted.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(x)[0], adapted)


def test_all_linear_passes_an_adapted_out_projection_by():
    model = ours(encoder(), target_modules=["self_attn"])
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    found = {
        name
        for name, module in model.get_base_model().named_modules()
        if "second" in getattr(module, "r", {})
    }
    assert found == {f"layers.{layer}.linear{place}" for layer in (0, 1) for place in (1, 2)}
