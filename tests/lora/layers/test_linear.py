from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import MergeError
from rankfold.lora.layers.linear import LoraConv1D, LoraLinear
from rankfold.lora.placing.placement import remove

OPTIONS = {"r": 3, "lora_alpha": 6, "target_modules": ["proj"]}
TRANSPOSED = {"fan_in_fan_out": True}  # said to PEFT, which warns otherwise; rankfold needs no telling


class Net(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj, self.head = proj, nn.Identity()

    def forward(self, x):
        return self.head(self.proj(x))


def conv1d() -> Net:
    torch.manual_seed(0)
    return Net(Conv1D(7, 5))


def linear(**options) -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(5, 7, **options))


class Doubled(nn.Linear):
    """A subclass with a forward of its own and more than one input."""

    def forward(self, x, times=2):
        return times * super().forward(x)


def subclass() -> Net:
    torch.manual_seed(0)
    return Net(Doubled(5, 7))


def sample(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(5)).to(dtype)


def ours(net: nn.Module, **options) -> PeftModel:
    model = get_peft_model(net, LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def pefts(net: nn.Module, **options) -> nn.Module:
    model = peft.get_peft_model(net, peft.LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def save(model: nn.Module, folder) -> None:
    with warnings.catch_warnings():  # PEFT takes the bias for a shard of a tensor
        warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape.*lora_B.bias")
        model.save_pretrained(folder)


def test_a_conv1d_computes_the_dense_formula_on_its_transposed_weight():
    net = conv1d().double()
    weight, x = net.proj.weight.detach().clone(), sample(torch.float64)
    model = ours(net)
    lora_a, lora_b = net.proj.factors("default")
    assert (tuple(lora_a.shape), tuple(lora_b.shape)) == ((3, 5), (7, 3))
    torch.testing.assert_close(model(x), x @ (weight + 2 * (lora_b @ lora_a).T) + net.proj.bias)
    assert isinstance(net.proj, Conv1D)
    assert (type(net.proj).plain_class, net.proj.in_features, net.proj.out_features) == (Conv1D, 5, 7)
    assert isinstance(net.proj, LoraConv1D)


CASES = [
    (conv1d, {}, TRANSPOSED),
    (conv1d, {"lora_bias": True, "use_rslora": True}, TRANSPOSED),
    (linear, {"lora_bias": True}, {}),
    (lambda: linear(bias=False), {}, {}),
]


@pytest.mark.parametrize(("build", "options", "told"), CASES)
@pytest.mark.peft("`nn.Linear`, transformers `Conv1D`", "same", "same")
def test_files_pass_between_peft_and_rankfold(build, options, told, tmp_path):
    x = sample()
    mine = ours(build(), **options)
    save(mine, tmp_path / "ours")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(build(), tmp_path / "ours")(x), mine(x))
    assert not torch.allclose(build()(x), mine(x))
    theirs = pefts(build(), **options | told)
    save(theirs, tmp_path / "theirs")
    again = PeftModel.from_pretrained(build(), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))
    save(again, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    torch.testing.assert_close(again.merge_and_unload()(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize(("build", "options", "told"), CASES)
def test_one_seed_gives_the_same_start_as_peft(build, options, told):
    mine, theirs = build(), build()
    torch.manual_seed(7)
    get_peft_model(mine, LoraConfig(**OPTIONS | options))
    torch.manual_seed(7)
    peft.get_peft_model(theirs, peft.LoraConfig(**OPTIONS | options | told))
    for factor in ("lora_A", "lora_B"):
        found, expected = (getattr(net.proj, factor)["default"].state_dict() for net in (mine, theirs))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("build", [conv1d, linear, subclass])
def test_the_start_is_the_base_to_the_last_bit(build):
    net = build()
    expected = net(sample())
    model = get_peft_model(net, LoraConfig(**OPTIONS, lora_bias=True))
    assert torch.equal(model(sample()), expected)
    with torch.no_grad():
        assert torch.equal(model(sample()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "options"), [(conv1d, {}), (conv1d, {"lora_bias": True}), (linear, {"lora_bias": True})]
)
def test_merging_keeps_the_output_and_unmerging_gives_back_the_bits(build, options, dtype):
    net, x = build().to(dtype), sample(dtype)
    before = copy.deepcopy(net.state_dict())
    model = ours(net, **options)
    expected = model(x)
    model.merge_adapter()
    assert not torch.equal(net.proj.weight, before["proj.weight"])
    assert torch.equal(net.proj.bias, before["proj.bias"]) == (not options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(model(x), expected, **tolerance)
    model.unmerge_adapter()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(model(x), expected)


@pytest.mark.peft("`lora_bias`", "same", "same")
def test_the_bias_is_scaled_and_trained_as_in_peft():
    models = [ours(linear(), lora_bias=True), pefts(linear(), lora_bias=True)]
    for model in models:
        model(sample()).square().sum().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert found.keys() == expected.keys()
    assert any(name.endswith("lora_B.default.bias") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_bias_is_not_merged_into_a_layer_without_one():
    net = linear(bias=False)
    before = net.proj.weight.detach().clone()
    with warnings.catch_warnings():
        model = ours(net, lora_bias=True)
    with pytest.raises(MergeError, match="proj: Impossible to merge LoRA with `lora_bias=True`"):
        model.merge_adapter()
    assert torch.equal(net.proj.weight, before)


@pytest.mark.parametrize("build", [conv1d, linear, subclass])
def test_disabling_gives_the_base_and_restoring_a_plain_layer(build):
    net, plain = build(), build()
    model = ours(net)
    with model.disable_adapter():
        assert torch.equal(model(sample()), plain(sample()))
    remove(net)
    assert type(net.proj) is type(plain.proj)
    assert vars(net.proj).keys() == vars(plain.proj).keys()
    assert list(net.state_dict()) == list(plain.state_dict())


def test_a_subclass_keeps_its_own_forward_and_arguments():
    net, plain = subclass(), subclass()
    ours(net)
    lora_a, lora_b = net.proj.factors("default")
    update = 2 * sample() @ (lora_b @ lora_a).T
    torch.testing.assert_close(net(sample()), plain(sample()) + update)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for x in (sample(), sample()[0]):
                expected = plain.proj(x, times=3) + 2 * x @ (lora_b @ lora_a).T
                torch.testing.assert_close(net.proj(x, times=3), expected)
    assert isinstance(net.proj, (Doubled, LoraLinear))
    assert type(net.proj).__name__ == "LoraDoubled"


def written(build, folder, told, **options) -> list[dict]:
    given = LoraConfig(**OPTIONS | options)
    get_peft_model(build(), given).save_pretrained(folder / "ours")
    assert given.fan_in_fan_out is False
    peft.get_peft_model(build(), peft.LoraConfig(**OPTIONS | options | told)).save_pretrained(
        folder / "theirs"
    )
    return [json.loads((folder / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]


@pytest.mark.parametrize(("build", "told", "expected"), [(conv1d, TRANSPOSED, True), (linear, {}, False)])
def test_the_file_says_how_the_weights_lie_as_pefts_does(build, told, expected, tmp_path):
    mine, theirs = written(build, tmp_path, told)
    assert mine == theirs
    assert mine["fan_in_fan_out"] is expected


def test_a_linear_among_the_targets_leaves_fan_in_fan_out_false(tmp_path):
    def both() -> Net:
        net = conv1d()
        net.head = nn.Linear(7, 4)
        return net

    get_peft_model(both(), LoraConfig(**OPTIONS | {"target_modules": ["proj", "head"]})).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("targets", [None, ["c_attn", "c_proj", "c_fc"], "all-linear"], ids=str)
@pytest.mark.peft("GPT-2 (`Conv1D`, `fan_in_fan_out`)", "same", "same")
def test_gpt2_passes_between_peft_and_rankfold(targets, tmp_path):
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"r": 3, "target_modules": targets, "task_type": "CAUSAL_LM"}
    mine = get_peft_model(tiny_gpt2(), LoraConfig(**options)).eval()
    randomise(mine)
    mine.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, mine(ids).logits)
    assert not torch.allclose(tiny_gpt2()(ids).logits, mine(ids).logits)
    fresh = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**options, fan_in_fan_out=True)).eval()
    randomise(fresh, seed=2)
    fresh.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "theirs")
    torch.testing.assert_close(again(ids).logits, fresh(ids).logits)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, fresh(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_conv1d_is_printed_with_its_adapters():
    model = get_peft_model(conv1d(), LoraConfig(r=2, target_modules="all-linear"))
    printed = [repr(layer) for layer in model.modules() if isinstance(layer, LoraConv1D)]
    assert printed
    assert all(text.startswith("lora.Linear(") and "default: rank=2" in text for text in printed)
