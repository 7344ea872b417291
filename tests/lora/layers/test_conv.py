from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError
from rankfold.lora.layers.conv import LoraConv2d
from rankfold.lora.placing.placement import remove

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": ["0"]}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIDE = 8

# What PEFT's lora_A takes over from the base, and so gets right.
KEPT = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
]
# What it does not.
LOST = [
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "stride": 2},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
]


def build(dimensions: int, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[dimensions](6, 8, **options), nn.ReLU())


def grouped() -> nn.Sequential:
    return build(2, kernel_size=3, groups=2)


def sample(dimensions: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 6, *[SIDE] * dimensions, generator=generator).to(dtype)


def ours(net: nn.Module, **options) -> PeftModel:
    model = get_peft_model(net, LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def pefts(net: nn.Module, **options) -> nn.Module:
    with warnings.catch_warnings():  # PEFT warns of each grouped convolution
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        model = peft.get_peft_model(net, peft.LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


@pytest.mark.parametrize("options", [*KEPT, *LOST], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_output_is_that_of_the_dense_weight(dimensions, options):
    net = build(dimensions, **options).double()
    plain, x = copy.deepcopy(net), sample(dimensions, torch.float64)
    model = ours(net)
    lora_a, lora_b = net[0].factors("default")
    with torch.no_grad():
        plain[0].weight += 2 * torch.einsum(
            "or...,ri...->oi...", lora_b.expand(*lora_b.shape[:2], *lora_a.shape[2:]), lora_a
        )
    torch.testing.assert_close(model(x), plain(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("shape", KEPT, ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.peft("`nn.Conv1d`, `Conv2d`, `Conv3d`", "same", "same")
def test_files_pass_between_peft_and_rankfold(dimensions, shape, options, tmp_path):
    if options and not shape.get("bias", True):
        shape = shape | {"bias": True}
    x = sample(dimensions)
    mine = ours(build(dimensions, **shape), **options)
    mine.save_pretrained(tmp_path / "ours")
    kernel = (shape["kernel_size"],) * dimensions
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert tensors.pop("base_model.model.0.lora_A.weight").shape == (4, 6, *kernel)
    assert tensors.pop("base_model.model.0.lora_B.weight").shape == (8, 4, *[1] * dimensions)
    assert list(tensors) == (["base_model.model.0.lora_B.bias"] if options else [])
    loaded = peft.PeftModel.from_pretrained(build(dimensions, **shape), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), mine(x))
    assert not torch.allclose(build(dimensions, **shape)(x), mine(x))
    theirs = pefts(build(dimensions, **shape), **options)
    with warnings.catch_warnings():  # PEFT takes the bias for a shard of a tensor
        warnings.filterwarnings("ignore", ".*LoRA tensor\\(s\\) have invalid shape.*lora_B.bias")
        theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(build(dimensions, **shape), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert type(merged[0]) is KINDS[dimensions]


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.peft("grouped convolutions", "same; not merged", "same; merging is refused by name")
def test_grouped_convolutions_pass_between_peft_and_rankfold(dimensions, groups, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(KINDS[dimensions](6, 12, 3, groups=groups)), sample(dimensions)
    theirs = pefts(copy.deepcopy(base), r=6)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.0.lora_A.weight"].shape == (6, 6, *[3] * dimensions)
    assert tensors["base_model.model.0.lora_B.weight"].shape == (12, 6 // groups, *[1] * dimensions)
    mine = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(mine(x), theirs(x))
    mine.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_grouped_update_is_a_dense_convolution_which_the_grouped_weight_cannot_hold():
    net, x = grouped().double(), sample(2, torch.float64)
    plain = copy.deepcopy(net)
    model = ours(net)
    lora_a, lora_b = net[0].factors("default")
    dense = torch.cat(
        [b.flatten(1) @ a.flatten(1) for a, b in zip(lora_a.chunk(2), lora_b.chunk(2), strict=True)]
    )
    update = nn.functional.conv2d(x, 2 * dense.view(8, 6, 3, 3))
    torch.testing.assert_close(model(x), torch.relu(plain[0](x) + update))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MergeError, match=r"0: lora_A of a convolution in 2 groups reads all channels"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.peft(
    "`dilation` and `padding_mode` of a convolution",
    "lost: merged and unmerged differ",
    "kept: merged and unmerged agree",
)
def test_pefts_forward_is_another_function_than_its_merged_weight(options):
    theirs, x = pefts(build(2, **options)), sample(2)
    unmerged = theirs(x)
    merged = theirs.merge_and_unload()(x)
    assert (unmerged - merged).abs().max() > 0.1
    mine = ours(build(2, **options))
    torch.testing.assert_close(mine(x), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_one_seed_gives_the_same_start_as_peft(dimensions, init):
    for lora_bias in {False, init != "gaussian"}:
        options = OPTIONS | {"init_lora_weights": init, "lora_bias": lora_bias}
        mine, theirs = build(dimensions, kernel_size=3), build(dimensions, kernel_size=3)
        torch.manual_seed(7)
        get_peft_model(mine, LoraConfig(**options))
        torch.manual_seed(7)
        peft.get_peft_model(theirs, peft.LoraConfig(**options))
        for factor in ("lora_A", "lora_B"):
            found, expected = (getattr(net[0], factor)["default"].state_dict() for net in (mine, theirs))
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_the_start_is_the_base_to_the_last_bit():
    net, x = build(2, kernel_size=3), sample(2)
    expected = net(x)
    assert torch.equal(get_peft_model(net, LoraConfig(**OPTIONS))(x), expected)


def test_gradients_are_pefts():
    x = sample(2)
    models = [ours(build(2, kernel_size=3)), pefts(build(2, kernel_size=3))]
    for model in models:
        model(x).square().sum().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_unmerge_gives_back_the_bits(dtype):
    net, x = build(2, kernel_size=3).to(dtype), sample(2, dtype)
    before = copy.deepcopy(net[0].state_dict())
    model = ours(net, lora_bias=True)
    expected = model(x)
    assert expected.dtype == dtype
    model.merge_adapter()
    assert not torch.equal(net[0].weight, before["weight"])
    assert not torch.equal(net[0].bias, before["bias"])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(model(x), expected, **tolerance)
    model.unmerge_adapter()
    assert torch.equal(net[0].weight, before["weight"])
    assert torch.equal(net[0].bias, before["bias"])
    assert torch.equal(model(x), expected)


def test_restoring_gives_back_a_plain_convolution():
    net = build(2, kernel_size=3)
    remove(ours(net).get_base_model())
    assert type(net[0]) is nn.Conv2d
    assert vars(net[0]).keys() == vars(nn.Conv2d(6, 8, 3)).keys()
    assert list(net[0].state_dict()) == ["weight", "bias"]


def test_disabling_gives_the_base_and_dropout_falls_in_training_only():
    net, x = build(2, kernel_size=3), sample(2)
    base = net(x)
    model = ours(net, lora_dropout=0.5)
    model.train()
    assert not torch.equal(model(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert (type(net[0]), net[0].in_features, net[0].out_features) == (LoraConv2d, 6, 8)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (grouped, {"r": 3}, "0: Targeting a Conv2d with groups=2 and rank 3"),
        (grouped, {"init_lora_weights": "olora"}, "0: .*init_lora_weights='olora' is for linear layers"),
        (
            lambda: nn.Sequential(Causal(6, 8, 3)),
            {},
            r"0: a Causal has a forward of its own; .*register_layer",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_left_alone(net, options, message):
    model = net()
    kind = type(model[0])
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**OPTIONS | options))
    assert type(model[0]) is kind
