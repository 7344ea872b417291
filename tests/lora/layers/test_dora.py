from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError
from rankfold.lora.layers.registry import adapter_layers

TARGETS = ["first", "second"]


class Net(nn.Module):
    """Two layers of the kinds under test; ``x`` fits the first."""

    def __init__(self, first: nn.Module, second: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.x = first, second, x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def linear_net() -> Net:
    return Net(nn.Linear(12, 10), nn.Linear(10, 9, bias=False), torch.randn(3, 4, 12))


def conv1d_net() -> Net:
    return Net(Conv1D(10, 12), Conv1D(9, 10), torch.randn(3, 4, 12))


def embedding_net() -> Net:
    return Net(nn.Embedding(30, 10, padding_idx=3), nn.Linear(10, 9), torch.arange(12).view(2, 6))


def convolution_net(dimensions: int) -> Net:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    x = torch.randn(2, 3, *[6] * dimensions)
    return Net(conv(3, 8, 3, padding=1), conv(8, 5, 1, bias=False), x)


NETS = {
    "linear": linear_net,
    "conv1d": conv1d_net,
    "embedding": embedding_net,
    "convolution1": lambda: convolution_net(1),
    "convolution2": lambda: convolution_net(2),
    "convolution3": lambda: convolution_net(3),
}


@pytest.fixture(params=NETS)
def net(request) -> Net:
    torch.manual_seed(0)
    return NETS[request.param]()


def config(**options) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": TARGETS, "use_dora": True} | options))


def tuned(net: nn.Module, **options) -> PeftModel:
    model = get_peft_model(copy.deepcopy(net), config(**options)).eval()
    randomise(model)
    return model


def in_peft(net: nn.Module, **options) -> peft.PeftModel:
    options = {"r": 4, "target_modules": TARGETS, "use_dora": True} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, which rankfold does not need to be told
        model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**options)).eval()
    randomise(model)
    return model


def test_the_first_output_is_the_bases_to_the_last_bit(net):
    model = get_peft_model(copy.deepcopy(net), config())
    assert torch.equal(model(net.x), net(net.x))


def test_the_first_output_of_a_half_precision_base_is_the_bases_too():
    torch.manual_seed(0)
    net = linear_net().bfloat16()
    x = net.x.bfloat16()
    for widen in (True, False):
        model = get_peft_model(copy.deepcopy(net), config(), autocast_adapter_dtype=widen)
        assert torch.equal(model(x), net(x))
        assert model.first.lora_magnitude_vector["default"].weight.dtype == (
            torch.float32 if widen else torch.bfloat16
        )


def test_the_magnitudes_and_their_keys_and_shapes_are_pefts(net):
    ours = get_peft_model(copy.deepcopy(net), config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "target_modules": TARGETS, "use_dora": True}
        theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**options))
    ours, theirs = ({k: v for k, v in m.state_dict().items() if "magnitude" in k} for m in (ours, theirs))
    assert list(ours) == list(theirs)
    for key, magnitude in ours.items():
        torch.testing.assert_close(magnitude, theirs[key])


@pytest.mark.peft("DoRA", "same", "same")
def test_an_adapter_written_here_gives_equal_outputs_in_peft(net, tmp_path):
    ours = tuned(net)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(theirs(net.x), ours(net.x))
    assert not torch.allclose(ours(net.x), net(net.x))


def test_an_adapter_written_by_peft_gives_equal_outputs_here(net, tmp_path):
    theirs = in_peft(net)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(ours(net.x), theirs(net.x))
    assert not torch.allclose(ours(net.x), net(net.x))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_a_language_model_gives_equal_logits_both_ways(options, tmp_path):
    options |= {"r": 4, "target_modules": "all-linear", "use_dora": True, "task_type": "CAUSAL_LM"}
    ids = torch.arange(9)[None]
    ours = get_peft_model(tiny_llama(), LoraConfig(**options)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, ours(input_ids=ids).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(again(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_step_has_pefts_output_and_gradients(net, dropout, tmp_path):
    """With dropout too: one seed drops the same, and the base part sees what was dropped."""
    ours = tuned(net, lora_dropout=dropout)
    ours.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, is_trainable=True)
    gradients = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(3)
        out = model(net.x)
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("magnitude" in name for name in gradients[0]) == 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_the_norm_has_no_gradient():
    """B's gradient is that of a fixed row factor (section 4.3 of the paper)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    model = tuned(net, target_modules=["0"])
    layer, x = model.get_base_model()[0], torch.randn(3, 6, dtype=torch.float64)
    lora_a, lora_b = (factor.requires_grad_() for factor in layer.factors("default"))
    rows = layer.row_factors("default", layer.weight).detach()
    expected = torch.autograd.grad((rows * (x @ (2 * lora_b @ lora_a).T)).sum(), lora_b)[0]
    scale = layer.scaling["default"]
    got = torch.autograd.grad(model(x).sum(), lora_b)[0]
    torch.testing.assert_close(got, expected * scale / 2)


def dense(layer: nn.Linear, names: list[str]) -> Tensor:
    """The changed weight in float64: the changes of all adapters added to the base."""
    weight = layer.weight.detach().double()
    total = weight.clone()
    for name in names:
        lora_a, lora_b = (factor.detach().double() for factor in layer.factors(name))
        changed = weight + layer.scaling[name] * lora_b @ lora_a
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
            changed = changed * (magnitude / torch.linalg.vector_norm(changed, dim=1))[:, None]
        total += changed - weight
    return total


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_a_large_update_keeps_the_dense_formula(size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    model = tuned(net, target_modules=["0"])
    layer, x = model.get_base_model()[0], torch.randn(5, 64)
    with torch.no_grad():
        layer.factors("default")[1].mul_(size)
    expected = x.double() @ dense(layer, ["default"]).T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-6)


def test_merged_is_unmerged_and_unmerging_restores_the_bits(net):
    model = tuned(net)
    before, state = model(net.x), copy.deepcopy(net.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(model(net.x), before)
    model.unmerge_adapter()
    assert torch.equal(model(net.x), before)
    assert all(torch.equal(model.get_base_model().state_dict()[key], value) for key, value in state.items())
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(net.x), before)
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in net.modules()]


def test_a_half_precision_base_merges_with_one_rounding_and_unmerges_exactly():
    torch.manual_seed(0)
    net = linear_net().bfloat16()
    model = tuned(net)
    layer = model.get_base_model().first
    expected = dense(layer, ["default"]).bfloat16()
    state = copy.deepcopy(net.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(layer.weight, expected, rtol=2**-8, atol=0)
    assert (layer.weight == expected).float().mean() > 0.99
    model.unmerge_adapter()
    assert all(torch.equal(model.get_base_model().state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("names", [["default", "plain"], ["plain", "default"], ["default", "other"]])
def test_the_changes_of_several_adapters_add_up_merged_or_not(names):
    """PEFT's DoRA also rescales the updates of the adapters before it, so its result depends on the order."""
    torch.manual_seed(0)
    net = linear_net()
    model = get_peft_model(copy.deepcopy(net), config())
    model.add_adapter("plain", config(use_dora=False, r=2))
    model.add_adapter("other", config(r=3))
    randomise(model)
    model.set_adapter(names)
    layer = model.get_base_model().first
    expected = F.linear(net.x.double(), dense(layer, names), layer.bias.double())
    torch.testing.assert_close(layer(net.x).double(), expected, rtol=1e-5, atol=1e-6)
    unmerged = model(net.x)
    model.merge_adapter()
    torch.testing.assert_close(model(net.x), unmerged)


def test_an_embedding_that_scales_its_output_is_merged_to_the_same_and_is_pefts(tmp_path):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    net = nn.Sequential(Gemma3TextScaledWordEmbedding(30, 10, 0, embed_scale=3.0))
    ids, model = torch.arange(12).view(2, 6), tuned(net, target_modules=["0"])
    apart = model(ids)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(theirs(ids), apart)
    torch.testing.assert_close(model.merge_and_unload()(ids), apart)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_dilated_or_circular_convolution_is_merged_to_the_same(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=2, dilation=2, padding_mode=mode))
    x, model = torch.randn(2, 3, 8, 8), tuned(net, target_modules=["0"], r=3)
    apart = model(x)
    torch.testing.assert_close(model(x[0]), apart[0])  # without a batch dimension
    torch.testing.assert_close(model.merge_and_unload()(x), apart)


@pytest.mark.peft(
    "a DoRA and a plain adapter active together", "depends on their order", "the sum of both changes"
)
def test_peft_scales_the_update_of_a_plain_adapter_before_it():
    torch.manual_seed(0)
    net = linear_net()
    theirs = in_peft(net)
    theirs.add_adapter("plain", peft.LoraConfig(r=2, target_modules=TARGETS))
    randomise(theirs)
    outputs = []
    for names in (["plain", "default"], ["default", "plain"]):
        theirs.base_model.set_adapter(names)
        outputs.append(theirs(net.x))
    assert not torch.allclose(*outputs, atol=1e-2)


def test_disabling_gives_the_base_and_restoring_a_plain_layer(net):
    model = tuned(net)
    with model.disable_adapter():
        assert torch.equal(model(net.x), net(net.x))
    plain = model.unload()
    assert torch.equal(plain(net.x), net(net.x))
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in net.modules()]
    assert plain.state_dict().keys() == net.state_dict().keys()


def test_a_deleted_adapter_takes_its_magnitudes_along(net):
    model = tuned(net)
    model.add_adapter("other", config(use_dora=False))
    model.delete_adapter("default")
    assert not [key for key in model.state_dict() if "magnitude" in key]


def test_magnitudes_are_trained_and_counted():
    model = get_peft_model(linear_net(), config())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "lora_magnitude_vector" in name]) == 2
    factors = 4 * (12 + 10) + 4 * (10 + 9)
    assert model.get_nb_trainable_parameters()[0] == factors + 10 + 9


@pytest.mark.peft("DoRA on a weight with a row of zeros", "NaN or infinite values", "stays finite")
def test_a_zero_row_stays_finite_where_peft_gives_nan():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        net[0].weight[2] = 0
    x = torch.randn(3, 6)
    ours = get_peft_model(copy.deepcopy(net), config(target_modules=["0"]))
    assert torch.equal(ours(x), net(x))
    ours(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.requires_grad)
    theirs = in_peft(nn.Sequential(copy.deepcopy(net[0])), target_modules=["0"], init_lora_weights=True)
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight.zero_()
    assert torch.isnan(theirs(x)).any() or torch.isinf(theirs(x)).any()


def test_it_compiles_into_one_graph():
    torch.manual_seed(0)
    net = linear_net()
    model = tuned(net)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(net.x), model(net.x))


def test_a_layer_that_moves_to_another_dtype_takes_its_magnitudes_along(net):
    model = tuned(net)
    before = model(net.x)
    x = net.x.double() if net.x.is_floating_point() else net.x
    torch.testing.assert_close(model.double()(x).float(), before)


def test_a_zero_row_of_a_half_precision_base_with_factors_like_it_stays_finite():
    net = nn.Sequential(nn.Linear(6, 5)).half()
    with torch.no_grad():
        net[0].weight[2] = 0
    model = get_peft_model(net, config(target_modules=["0"]), autocast_adapter_dtype=False)
    assert torch.isfinite(model(torch.randn(3, 6).half())).all()


def test_a_layer_without_dora_is_refused_by_name_and_left_alone():
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(ConfigError, match="0: .*max_norm and use_dora"):
        get_peft_model(net, config(target_modules=["0"], r=2))
    assert type(net[0]) is nn.Embedding


def test_lora_bias_and_dora_exclude_each_other_as_in_peft():
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.LoraConfig(use_dora=True, lora_bias=True)


def test_dora_is_refused_while_something_is_merged():
    model = get_peft_model(linear_net(), config(use_dora=False))
    randomise(model)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"\['default'\] are merged into it; unmerge_adapter\(\) first"):
        model.add_adapter("other", config())
    assert [name for _, layer in adapter_layers(model) for name in layer.adapter_names()] == ["default"] * 2
