from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, PeftModel, dequantise, get_peft_model, prepare_model_for_kbit_training
from rankfold.compat import unpack_four_bit
from rankfold.errors import ConfigError, MergeError, ModelError

ROWS, COLUMNS = 128, 64  # bitsandbytes repacks whole blocks of 64 columns only
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]}
KINDS = ["nf4", "fp4", "nf4 stored as bfloat16", "int8"]
MANY = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Sequential):
    """Two quantised layers with a non-linearity; the attributes are those that PEFT asks for."""

    def __init__(self, kind: str, **options) -> None:
        torch.manual_seed(0)
        plain = [nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS)]
        first, last = (quantised(layer, kind, **options) for layer in plain)
        super().__init__(first, nn.Tanh(), last)
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = kind == "int8", kind != "int8"


def quantised(layer: nn.Linear, kind: str, **options) -> nn.Linear:
    size = layer.in_features, layer.out_features
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
    else:
        if "bfloat16" in kind:
            options["quant_storage"] = torch.bfloat16
        made = bnb.nn.Linear4bit(*size, quant_type=kind[:3], compute_dtype=torch.float32, **options)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def adapted(kind: str, **options) -> PeftModel:
    model = get_peft_model(Net(kind), LoraConfig(**CONFIG | options))
    randomise(model)
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    if left.keys() != right.keys():
        return False
    # As bytes: the floats that store 4-bit numbers may be NaN.
    pairs = [
        (left[key].reshape(-1).view(torch.uint8), right[key].reshape(-1).view(torch.uint8)) for key in left
    ]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(3))


@MANY
def test_the_layer_is_the_same_object_with_added_keys_and_the_same_first_output(kind, x):
    net = Net(kind).train()
    expected, before, layer = net(x), list(net.state_dict()), net[0]
    get_peft_model(net, LoraConfig(**CONFIG))
    assert net[0] is layer
    assert isinstance(layer, bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit)
    assert type(layer).__name__ == ("LoraLinear8bitLt" if kind == "int8" else "LoraLinear4bit")
    assert [key for key in net.state_dict() if "lora_" not in key] == before
    assert torch.equal(net(x), expected)


@MANY
def test_the_output_is_the_dense_formula_on_the_dequantised_weight(kind, x):
    model = adapted(kind).train()
    layer = model.get_base_model()[0]
    a, b = (factor.double() for factor in layer.factors("default"))
    weight = layer.base_weight().double() + 2.0 * b @ a
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T + layer.bias, rtol=1e-5, atol=1e-5)


@MANY
def test_equal_factors_give_pefts_outputs_and_gradients(kind, x):
    ours = adapted(kind).train()
    theirs = peft.get_peft_model(Net(kind), peft.LoraConfig(**CONFIG)).train()
    randomise(theirs)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    gradients = [[p.grad for n, p in model.named_parameters() if "lora_" in n] for model in (ours, theirs)]
    assert len(gradients[0]) == 4
    for mine, other in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@MANY
def test_files_go_both_ways_between_here_and_peft(kind, x, tmp_path):
    ours = adapted(kind).train()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(kind), tmp_path / "ours").train()
    torch.testing.assert_close(theirs(x), ours(x))
    randomise(theirs, seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(Net(kind), tmp_path / "theirs").train()
    torch.testing.assert_close(again(x), theirs(x))


@MANY
@pytest.mark.peft("DoRA on 8-bit and 4-bit weights of bitsandbytes", "same", "same")
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_dora_gives_pefts_outputs_and_gradients_and_files_go_both_ways(kind, x, tmp_path, options):
    options |= {"use_dora": True}
    ours = adapted(kind, **options).train()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(kind), tmp_path / "ours", is_trainable=True).train()
    outputs, gradients = [], []
    for model in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == 6
    for mine, other in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    theirs = peft.get_peft_model(Net(kind), peft.LoraConfig(**CONFIG, **options)).train()
    randomise(theirs, seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(Net(kind), tmp_path / "theirs").train()
    outputs = []
    for model in (again, theirs):
        torch.manual_seed(2)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.peft("DoRA on 8-bit weights of bitsandbytes on a CPU, a second forward", "fails", "works")
def test_pefts_dora_on_8_bits_fails_in_its_second_forward_and_ours_does_not(x):
    ours = adapted("int8", use_dora=True).train()
    assert torch.equal(ours(x), ours(x))
    theirs = peft.get_peft_model(Net("int8"), peft.LoraConfig(**CONFIG, use_dora=True)).train()
    theirs(x)
    with pytest.raises(AttributeError, match="unsqueeze"):
        theirs(x)


@MANY
def test_dora_changes_nothing_at_first_and_is_the_dense_formula_and_exact_when_dequantised(kind, x):
    net = Net(kind).train()
    expected = net(x)
    model = get_peft_model(net, LoraConfig(**CONFIG, use_dora=True)).train()
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    randomise(model)
    layer = model.get_base_model()[0]
    changed = layer.base_weight().double() + layer.delta("default")
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    dense = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        layer(x).double(), x @ dense.T.float() + layer.bias, rtol=1e-4, atol=1e-4, check_dtype=False
    )
    expected = model(x)
    with pytest.warns(UserWarning, match="rounded again"):
        model.merge_adapter()
    model.unmerge_adapter()
    plain = dequantise(model).merge_and_unload()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


@MANY
def test_one_seed_gives_the_same_start_as_peft(kind):
    torch.manual_seed(7)
    ours = get_peft_model(Net(kind), LoraConfig(**CONFIG))
    torch.manual_seed(7)
    theirs = peft.get_peft_model(Net(kind), peft.LoraConfig(**CONFIG))
    mine, other = ([p for n, p in model.named_parameters() if "lora_" in n] for model in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@MANY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_base_output(kind, x, dtype):
    if kind == "int8" and dtype == torch.float16:
        x = x / 4
    base, model = Net(kind).train(), adapted(kind).train()
    wanted = base(x.to(dtype)).dtype
    assert model(x.to(dtype)).dtype == wanted
    assert model.get_base_model()[0].factors("default")[0].dtype == torch.float32


@MANY
def test_under_autocast_the_base_part_is_not_rounded(kind, x):
    base, model = Net(kind).train(), get_peft_model(Net(kind), LoraConfig(**CONFIG)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = base(x), model(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@MANY
def test_dequantised_layers_compute_the_same_and_merge_exactly(kind, x):
    model = adapted(kind, lora_bias=True).train()
    expected = model(x)
    layer = model.get_base_model()[0]
    assert dequantise(model) is model
    assert type(layer).__name__ == "LoraLinear"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert type(plain[0]) is nn.Linear
    assert vars(plain[0]).keys() == vars(nn.Linear(3, 3)).keys()


def test_dequantising_takes_the_dtype_of_the_other_weights_and_needs_something_to_do():
    net = Net("nf4")
    net.append(nn.LayerNorm(COLUMNS).bfloat16())
    dequantise(net)
    assert net[0].weight.dtype == net[0].bias.dtype == torch.bfloat16
    assert dequantise(Net("int8"), torch.float64)[2].weight.dtype == torch.float64
    with pytest.raises(ModelError, match="no layer of this model is quantised"):
        dequantise(net)


@MANY
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
@pytest.mark.peft(
    "merging into 8-bit and 4-bit weights",
    "rounds again, with a warning that names no size",
    "rounds again, and says by how much; exact after `dequantise(model)`",
)
def test_a_merge_into_few_bits_is_as_wrong_as_it_says(kind, x, options):
    model = adapted(kind, **options).train()
    net = model.get_base_model()
    unmerged = model(x)
    exact = [net[place].base_weight() + net[place].delta("default") for place in (0, 2)]
    with pytest.warns(UserWarning, match="^2 quantised layers were merged") as caught:
        model.merge_adapter()
    layer = net[0]
    missed = [(net[i].base_weight().detach() - w.detach()).norm() for i, w in zip((0, 2), exact, strict=True)]
    shares = [float(m / net[i].delta("default").detach().norm()) for i, m in zip((0, 2), missed, strict=True)]
    assert f"misses up to {max(shares):.0%} of the adapter's update" in str(caught[0].message)
    limit = {"nf4": 0.12, "fp4": 0.2, "int8": 0.01}[kind.split()[0]]
    assert missed[0] < limit * exact[0].norm()
    assert (model(x) - unmerged).norm() < 5 * limit * unmerged.norm()
    with pytest.warns(UserWarning, match="rounded again"), model.disable_adapter():
        pass  # merges again, and says so again
    assert layer.merged


@MANY
def test_unmerging_gives_back_the_exact_bits(kind, x):
    model = adapted(kind, lora_bias=True).train()
    before, expected = bits(model), model(x)
    for called in (True, False):  # with a forward of the merged layer, which moves 8-bit scales, and without
        with pytest.warns(UserWarning, match="merged and rounded again"):
            model.merge_adapter()
        assert not same(bits(model), before)
        if called:
            assert not torch.equal(model(x), expected)
        model.unmerge_adapter()
        assert same(bits(model), before)
        assert torch.equal(model(x), expected)


@MANY
def test_the_merged_layer_keeps_the_parameters_of_its_quantisation(kind):
    model = adapted(kind)
    weight = model.get_base_model()[0].weight
    with pytest.warns(UserWarning, match="rounded again"):
        plain = model.merge_and_unload()
    merged = plain[0].weight
    assert merged is not weight
    assert type(merged) is type(weight)
    assert merged.dtype == weight.dtype
    if kind != "int8":
        old, new = weight.quant_state, merged.quant_state
        for name in ("dtype", "quant_type", "blocksize", "shape", "nested"):
            assert getattr(old, name) == getattr(new, name)
    assert vars(plain[0]).keys() == vars(Net(kind)[0]).keys()
    assert type(plain[0]) is type(Net(kind)[0])


@MANY
def test_peft_merges_lora_bias_without_its_scale(kind):
    ours = adapted(kind, lora_bias=True)
    theirs = peft.get_peft_model(Net(kind), peft.LoraConfig(**CONFIG, lora_bias=True))
    randomise(theirs)
    bias = Net(kind)[0].bias
    shift = ours.get_base_model()[0].lora_B["default"].bias.detach().clone()
    with pytest.warns(UserWarning, match="rounded again"):
        ours = ours.merge_and_unload()
    with pytest.warns(UserWarning, match="rounding errors"):
        theirs = theirs.merge_and_unload()
    torch.testing.assert_close(ours[0].bias - bias, 2.0 * shift)  # scale = 8 / 4
    torch.testing.assert_close(theirs[0].bias - bias, shift)


@MANY
def test_unloading_leaves_plain_layers_with_their_bits(kind, x):
    net = Net(kind).train()
    net(x)
    before, keys = bits(net), [vars(net[place]).keys() for place in (0, 2)]
    model = get_peft_model(net, LoraConfig(**CONFIG))
    randomise(model)
    model(x)
    plain = model.unload()
    assert [type(plain[place]) for place in (0, 2)] == [type(Net(kind)[0])] * 2
    assert [vars(plain[place]).keys() for place in (0, 2)] == keys
    assert same(bits(plain), before)


@MANY
def test_disabled_is_the_base_and_several_adapters_add_up(kind, x):
    model = adapted(kind).train()
    expected = Net(kind).train()(x)
    model.add_adapter("other", LoraConfig(**CONFIG | {"r": 2}))
    randomise(model, seed=4)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    layer = model.get_base_model()[0]
    model.set_adapter(["default", "other"])
    both = layer.base_weight() + layer.delta("default") + layer.delta("other")
    torch.testing.assert_close(layer(x), x @ both.T + layer.bias, rtol=1e-4, atol=1e-5)


@MANY
def test_a_copy_is_independent(kind, x):
    model = adapted(kind).train()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        twin.get_base_model()[0].factors("default")[1].zero_()
    assert not torch.allclose(twin(x), model(x))


@MANY
def test_what_a_quantised_layer_cannot_carry_is_refused_by_name(kind):
    net = Net(kind)
    with pytest.raises(
        ConfigError,
        match="changes the base weight, and this one is ",
    ):
        get_peft_model(net, LoraConfig(**CONFIG, init_lora_weights="pissa"))
    assert [type(layer) for layer in net] == [type(layer) for layer in Net(kind)]


@MANY
def test_a_rank_beyond_the_weight_is_told_of(kind):
    with pytest.warns(UserWarning, match="rank exceeds.*\n.*rank 65 on a "):
        get_peft_model(Net(kind), LoraConfig(**CONFIG | {"r": 65}))


def test_a_layer_that_is_not_quantised_yet_is_refused():
    net = nn.Sequential(bnb.nn.Linear4bit(COLUMNS, ROWS))
    with pytest.raises(ConfigError, match="not quantised yet"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))


def repack(layer: nn.Module) -> None:
    """What bitsandbytes does in the first call without gradients on a CPU with AVX512-BF16."""
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )


@pytest.mark.peft(
    "4-bit on a CPU with AVX512-BF16, after an evaluation",
    "merging reads the repacked weight as noise",
    "an adapted layer is not repacked, so it also trains after an evaluation",
)
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_was_repacked_for_inference_is_unpacked(nested, x):
    net = Net("nf4", compress_statistics=nested)
    weights = [bnb.functional.dequantize_4bit(net[i].weight.data, net[i].weight.quant_state) for i in (0, 2)]
    for place in (0, 2):
        repack(net[place])
    theirs = peft.utils.integrations.dequantize_bnb_weight(net[0].weight)
    assert (theirs - weights[0]).abs().max() > 0.1
    model = get_peft_model(net, LoraConfig(**CONFIG))
    for place, weight in zip((0, 2), weights, strict=True):
        torch.testing.assert_close(net[place].base_weight(), weight, rtol=1e-2, atol=0)  # bfloat16 scales
    randomise(model)
    model.train()(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)
    unpack_four_bit(net[0].weight)  # a second time changes nothing
    torch.testing.assert_close(net[0].base_weight(), weights[0], rtol=1e-2, atol=0)


def test_an_adapted_4_bit_layer_trains_after_an_evaluation_with_the_same_output(x):
    model = adapted("nf4")
    for place in (0, 2):
        vars(model.get_base_model()[place])["support_avx512bf16_for_cpu"] = True
    with torch.no_grad():
        evaluated = model.eval()(x)
    trained = model.train()(x)
    assert torch.equal(evaluated, trained)
    trained.sum().backward()
    assert model.get_base_model()[0].factors("default")[0].grad.abs().sum() > 0


@pytest.fixture(scope="module")
def torchao() -> Iterator[object]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*KernelPreference|.*Enum subclass")
        import torchao.quantization
    return torchao.quantization


def torchao_net(torchao, bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Tanh(), nn.Linear(ROWS, COLUMNS)).to(dtype)
    int4 = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig() if bits == 8 else int4)
    return net


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_torchao_weight_is_adapted_trained_and_merged_after_dequantising(torchao, bits, dtype, x):
    net, x = torchao_net(torchao, bits, dtype), x.to(dtype)
    base = net(x)
    model = get_peft_model(net, LoraConfig(**CONFIG)).train()
    assert type(net[0]).__name__ == "LoraLinear"
    assert torch.equal(model(x), base)
    randomise(model)
    out = model(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(MergeError, match=r"torchao \w+Tensor, which holds no sum; dequantise\(model\) first"):
        model.merge_adapter()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    dequantise(model)
    torch.testing.assert_close(model(x), out, **tolerance)
    torch.testing.assert_close(model.merge_and_unload()(x), out, **tolerance)


@pytest.mark.peft("torchao int8 and int4 weights", "same", "same; merging after `dequantise(model)`")
@pytest.mark.parametrize("bits", [8, 4])
def test_files_of_a_torchao_base_go_both_ways_between_here_and_peft(torchao, bits, x, tmp_path):
    ours = get_peft_model(torchao_net(torchao, bits), LoraConfig(**CONFIG)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")
        theirs = peft.PeftModel.from_pretrained(torchao_net(torchao, bits), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x))
    randomise(theirs, seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(torchao_net(torchao, bits), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))


def test_what_a_torchao_weight_cannot_carry_is_refused_by_name(torchao):
    with pytest.raises(ConfigError, match=r"0: its weight is a torchao Int8Tensor, which the starts"):
        get_peft_model(torchao_net(torchao, 8), LoraConfig(**CONFIG, init_lora_weights="pissa"))


def test_dora_of_a_torchao_weight_takes_its_norms_from_the_numbers(torchao):
    net = torchao_net(torchao, 8)
    model = get_peft_model(net, LoraConfig(**CONFIG, use_dora=True)).train()
    x = torch.randn(5, COLUMNS)
    torch.testing.assert_close(model(x), torchao_net(torchao, 8)(x))
    randomise(model)
    layer = model.get_base_model()[0]
    numbers = layer.weight.dequantize().float()
    direction = numbers + layer.get_delta_weight("default")
    magnitude = layer.lora_magnitude_vector["default"].weight
    norms = direction.norm(dim=1)
    torch.testing.assert_close(layer.row_factors("default"), magnitude / norms, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


class Model(Net):
    """A net with what ``prepare_model_for_kbit_training`` asks of a transformers model."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.norm = nn.LayerNorm(COLUMNS).half()
        self.calls: list[object] = []

    def enable_input_require_grads(self) -> None:
        self.calls.append("inputs")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        self.calls.append(gradient_checkpointing_kwargs or {})


@MANY
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, ["inputs", {}]),
        ({"use_gradient_checkpointing": False}, []),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, [{"use_reentrant": False}]),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["inputs", {"use_reentrant": True}]),
    ],
    ids=str,
)
@pytest.mark.peft("`prepare_model_for_kbit_training`", "same", "same")
def test_preparing_for_training_has_pefts_effects(kind, options, calls):
    ours, theirs = Model(kind), Model(kind)
    assert prepare_model_for_kbit_training(ours, **options) is ours
    peft.prepare_model_for_kbit_training(theirs, **options)
    assert ours.calls == theirs.calls == calls
    found = [{n: (p.dtype, p.requires_grad) for n, p in net.named_parameters()} for net in (ours, theirs)]
    assert found[0] == found[1]
    assert ours.norm.weight.dtype == torch.float32


def test_a_model_that_is_not_quantised_is_frozen_and_widened_only():
    net = nn.Sequential(nn.Linear(3, 4).bfloat16())
    prepare_model_for_kbit_training(net)
    assert net[0].weight.dtype == torch.float32
    assert not any(p.requires_grad for p in net.parameters())
