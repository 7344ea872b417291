from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError
from rankfold.lora.layers.registry import adapter_layers

SPLITTING = ["pissa", "pissa_niter_4", "olora"]
STARTS = [True, False, "gaussian", "orthogonal", *SPLITTING]
NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9, bias=False)),
    "conv1d": lambda: nn.Sequential(Conv1D(10, 12), nn.Tanh(), Conv1D(9, 10)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)).bfloat16(),
}


def net(kind: str = "linear") -> nn.Sequential:
    torch.manual_seed(0)
    return NETS[kind]()


def inputs(model: nn.Module) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(4)).to(next(model.parameters()).dtype)


def options(start, **more) -> dict:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": start} | more


def started(base: nn.Module, start, **more) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(base, LoraConfig(**options(start, **more)))


def in_peft(base: nn.Module, start, **more) -> peft.PeftModel:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|Rank-Stabilized)")
        return peft.get_peft_model(base, peft.LoraConfig(**options(start, **more)))


def bits(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"2": 2}}], ids=str)
@pytest.mark.peft("starts: orthogonal, PiSSA, OLoRA", "same", "same")
def test_one_seed_gives_pefts_factors_and_residual_to_the_bit(start, options):
    ours, theirs = started(net(), start, **options), in_peft(net(), start, **options)
    state = {key.replace(".base_layer", ""): value for key, value in theirs.state_dict().items()}
    assert ours.state_dict().keys() == state.keys()
    assert [key for key, value in ours.state_dict().items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
def test_the_residual_of_a_transposed_or_half_precision_weight_is_pefts_too(start):
    for kind in ("conv1d", "bfloat16"):
        ours, theirs = started(net(kind), start), in_peft(net(kind), start)
        for place in (0, 2):
            expected = theirs.base_model.model[place].base_layer.weight
            assert torch.equal(ours.get_base_model()[place].weight, expected)


@pytest.mark.parametrize("start", SPLITTING)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_residual_and_the_factors_make_the_weight(start, kind):
    base = net(kind)
    model = started(copy.deepcopy(base), start)
    for place in (0, 2):
        layer, whole = model.get_base_model()[place], base[place].weight
        torch.testing.assert_close(layer.weight + layer.delta("default"), whole, rtol=1e-5, atol=1e-6)
        assert layer.delta("default").norm() > 0.3 * whole.norm()
    torch.testing.assert_close(model(inputs(base)), base(inputs(base)))


def test_the_part_that_pissa_takes_is_the_best_of_its_rank():
    base = net()
    layer = started(copy.deepcopy(base), "pissa").get_base_model()[0]
    values = torch.linalg.svdvals(base[0].weight.double())
    left = torch.linalg.svdvals(layer.weight.double())
    torch.testing.assert_close(left[:6], values[4:10], rtol=1e-4, atol=1e-6)


def test_the_randomised_part_is_not_quite_the_best_and_more_rounds_come_closer():
    base, gaps = net(), []
    best = started(copy.deepcopy(base), "pissa").get_base_model()[0].weight
    for rounds in (0, 16):
        layer = started(copy.deepcopy(base), f"pissa_niter_{rounds}").get_base_model()[0]
        gaps.append((layer.weight.norm() / best.norm()).item() - 1)
    assert gaps[0] > 0.01
    assert -1e-6 < gaps[1] < gaps[0] / 4


@pytest.mark.peft("OLoRA on `Conv1D`", "factors of the wrong shape", "works")
def test_pefts_olora_of_a_transposed_weight_does_not_fit_and_ours_does():
    """It decomposes (in, out) as if that were (out, in)."""
    base = nn.Sequential(net("conv1d")[0])
    theirs = in_peft(copy.deepcopy(base), "olora", target_modules=["0"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs(inputs(base))
    ours = started(copy.deepcopy(base), "olora", target_modules=["0"])
    torch.testing.assert_close(ours(inputs(base)), base(inputs(base)))


@pytest.mark.parametrize("start", SPLITTING)
@pytest.mark.peft(
    "PiSSA or OLoRA on a half-precision base",
    "factors rounded to half precision",
    "float32 factors: nearer to the base",
)
def test_a_half_precision_start_is_nearer_to_the_base_than_pefts(start):
    """PEFT rounds the factors to bfloat16 after it has subtracted the unrounded ones."""
    base = net("bfloat16")
    ours, theirs = started(copy.deepcopy(base), start), in_peft(copy.deepcopy(base), start)
    gaps = []
    for layer in (ours.get_base_model()[0], theirs.base_model.model[0]):
        factors = [getattr(layer, side)["default"].weight for side in ("lora_A", "lora_B")]
        assert {factor.dtype for factor in factors} == {torch.float32}
        total = layer.weight.double() + 1.5 * factors[1].double() @ factors[0].double()
        gaps.append((total - base[0].weight.double()).norm().item())
    assert gaps[0] < gaps[1]
    residual = ours.get_base_model()[0].weight.double()
    assert gaps[0] < 2**-8 * residual.norm()


def test_orthogonal_starts_at_the_base_and_with_both_factors():
    base = net()
    model = started(copy.deepcopy(base), "orthogonal")
    torch.testing.assert_close(model(inputs(base)), base(inputs(base)))
    assert all(f.abs().sum() > 0 for _, layer in adapter_layers(model) for f in layer.factors("default"))


@pytest.mark.parametrize("start", SPLITTING)
@pytest.mark.parametrize("kind", NETS)
def test_whatever_takes_the_adapter_off_gives_the_base_back_to_the_bit(start, kind):
    base = net(kind)
    model = started(copy.deepcopy(base), start)
    randomise(model)
    x, tuned = inputs(base), model(inputs(base))
    assert not torch.allclose(tuned, base(x), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), tuned)
    model.add_adapter("plain", LoraConfig(**options(True)))
    model.set_adapter("plain")
    assert torch.equal(model(x), base(x))
    model.set_adapter("default")
    assert torch.equal(model(x), tuned)
    model.delete_adapter("default")
    assert torch.equal(model(x), base(x))
    plain = model.unload()
    assert same(bits(plain), bits(base))
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in base.modules()]


@pytest.mark.parametrize("start", SPLITTING)
def test_unloading_gives_the_base_back_and_merging_the_tuned_weights(start):
    base = net()
    model = started(copy.deepcopy(base), start)
    randomise(model)
    x, tuned = inputs(base), model(inputs(base))
    assert same(bits(copy.deepcopy(model).unload()), bits(base))
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), tuned)
    assert not torch.allclose(plain(x), base(x), atol=1e-2)
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in base.modules()]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_merging_any_of_two_adapters_is_the_same_as_applying_them(kind, dora):
    base = net(kind)
    model = started(copy.deepcopy(base), "pissa")
    model.add_adapter("plain", LoraConfig(**options(True, use_dora=dora)))
    randomise(model)
    x = inputs(base)
    for names in (["default"], ["plain"], ["default", "plain"]):
        model.set_adapter(names)
        apart, state = model(x), bits(model)
        model.merge_adapter(names)
        torch.testing.assert_close(
            model(x), apart, **({"rtol": 0.05, "atol": 0.05} if kind == "bfloat16" else {})
        )
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.unmerge_adapter()
        model.set_adapter(names)
        assert same(bits(model), state)
    assert same(bits(model.unload()), bits(base))


def test_deleting_the_splitting_adapter_under_a_merge_leaves_the_base_below_it():
    base = net()
    model = started(copy.deepcopy(base), "pissa")
    model.add_adapter("plain", LoraConfig(**options(True)))
    randomise(model)
    model.set_adapter("plain")
    model.merge_adapter(["plain"])
    merged = model(inputs(base))
    model.delete_adapter("default")
    assert torch.equal(model(inputs(base)), merged)
    model.unmerge_adapter()
    assert same(bits(model.unload()), bits(base))


def test_the_kept_weight_moves_with_the_model_and_is_in_no_state_dict():
    base = net()
    model = started(copy.deepcopy(base), "pissa").double()
    assert not [key for key in model.state_dict() if "spare" in key]
    assert same(bits(model.unload()), bits(base.double()))


def test_the_gradient_is_right_when_the_base_was_asked_in_between():
    """As in preference training: the reference output comes between forward and backward."""
    model, gradients = started(net(), "pissa"), []
    x = inputs(model).requires_grad_()
    for ask in (False, True):
        out = model(x)
        if ask:
            with model.disable_adapter(), torch.no_grad():
                model(x)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.peft("an adapter with a PiSSA or OLoRA start, loaded on the original base", "same", "same")
def test_an_adapter_written_by_peft_gives_equal_logits_on_the_original_base(start, tmp_path):
    """Both read the start's name in the config and make the residual anew."""
    more = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ids = torch.arange(9)[None]
    theirs = in_peft(tiny_llama(), start, **more).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids).logits
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, expected)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, expected)
    assert not torch.allclose(tiny_llama()(ids).logits, expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_written_here_gives_equal_outputs_on_the_original_base_in_peft(start, tmp_path):
    ours = started(net(), start)
    randomise(ours)
    ours.save_pretrained(tmp_path)
    x = inputs(ours)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))


def test_loading_a_randomised_split_warns_and_needs_the_random_state_it_was_made_in(tmp_path):
    ours = started(net(), "pissa_niter_0")
    randomise(ours)
    ours.save_pretrained(tmp_path)
    outputs = []
    for seed in (7, 8):
        base = net()
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="only if the random state is the one in which"):
            outputs.append(PeftModel.from_pretrained(base, tmp_path)(inputs(ours)))
    torch.testing.assert_close(outputs[0], ours(inputs(ours)))
    assert not torch.allclose(outputs[1], outputs[0], atol=1e-3)


def test_a_load_that_fails_leaves_the_base_as_it_was(tmp_path):
    started(net(), "pissa").save_pretrained(tmp_path)
    other = net()
    with torch.no_grad():
        other[0] = nn.Linear(13, 10)
    before = bits(other)
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(other, tmp_path)
    assert same(bits(other), before)


def test_dora_and_a_split_start_at_the_base_together_and_merge():
    base = net()
    model = started(copy.deepcopy(base), "pissa", use_dora=True)
    x = inputs(base)
    torch.testing.assert_close(model(x), base(x))
    theirs = in_peft(copy.deepcopy(base), "pissa", use_dora=True)
    for place in (0, 2):
        ours = model.get_base_model()[place].lora_magnitude_vector["default"].weight
        torch.testing.assert_close(
            ours, theirs.base_model.model[place].lora_magnitude_vector["default"].weight
        )
    randomise(model)
    randomise(theirs)
    tuned = model(x)
    torch.testing.assert_close(tuned, theirs(x))
    torch.testing.assert_close(model.merge_and_unload()(x), tuned)


@pytest.mark.parametrize(
    ("module", "start", "message"),
    [
        (nn.Conv2d(4, 4, 3), "olora", "init_lora_weights='olora' is "),
        (nn.MultiheadAttention(8, 2), "pissa", "init_lora_weights='pissa' is "),
        (nn.Linear(6, 6), "orthogonal", "requires the LoRA rank to be even, got 3"),
        (nn.Linear(6, 6, device="meta"), "pissa", "holds no values"),
    ],
    ids=["convolution", "attention", "odd", "meta"],
)
def test_a_layer_that_a_start_is_not_for_is_refused_by_name_and_left_alone(module, start, message):
    model = nn.Sequential(module, nn.Linear(6, 6))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match=f"0: .*{message}"):
        get_peft_model(model, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=start))
    assert [type(m) for m in model.modules()] == kinds


def test_a_tied_weight_is_not_split():
    model = tiny_llama(tied=True)
    with pytest.raises(ConfigError, match="lm_head: its weight is tied to another module's"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa"))


def test_a_weight_of_whole_numbers_is_not_split():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="0: .*this start changes the base weight.*torch.int8"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"))


def test_a_weight_that_is_not_finite_is_not_split_and_nothing_is_changed():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="2: this start decomposes the base weight.*NaN"):
        started(model, "pissa")
    assert type(model[0]) is nn.Linear


def test_a_second_split_of_a_weight_is_refused():
    model = started(net(), "pissa")
    with pytest.raises(ConfigError, match="the start of \\['default'\\] has changed its base weight already"):
        model.add_adapter("other", LoraConfig(**options("olora")))
    assert list(model.peft_config) == ["default"]


def test_a_merged_weight_is_not_split():
    model = started(net(), True)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        model.add_adapter("other", LoraConfig(**options("pissa")))


@pytest.mark.parametrize("start", ["micah", "pissa_niter_", "pissa_niter_x", 1])
def test_a_start_that_is_not_known_is_refused_by_name(start):
    with pytest.raises(ConfigError, match=f"init_lora_weights must be .*got {start!r}"):
        LoraConfig(init_lora_weights=start)


def test_lora_bias_goes_with_the_plain_starts_only_as_in_peft():
    with pytest.raises(
        ConfigError, match="lora_bias=True is only supported with init_lora_weights=True or False"
    ):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")
    with pytest.raises(ValueError, match="only supported with init_lora_weights"):
        peft.LoraConfig(lora_bias=True, init_lora_weights="gaussian")
