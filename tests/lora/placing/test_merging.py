from __future__ import annotations

import copy

import pytest
import torch

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
OTHER = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_rslora=True)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


def two_adapters(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(tiny_llama().to(dtype), CONFIG)
    model.add_adapter("other", OTHER)
    randomise(model)
    return model.eval()


def base_bits(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.get_base_model().state_dict().items() if "lora_" not in n}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.peft("merge, then unmerge", "bf16: about 30 % of the weights change", "the exact bits come back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_back_the_exact_bits(dtype):
    model = two_adapters(dtype)
    before = base_bits(model)
    model.merge_adapter(["default", "other"])
    assert not same_bits(before, base_bits(model))
    model.unmerge_adapter()
    assert same_bits(before, base_bits(model))


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]])
def test_merged_equals_unmerged_for_one_adapter_and_for_several(names, ids):
    model = two_adapters()
    model.set_adapter(names)
    expected = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, expected)
    merged = model.merge_and_unload(adapter_names=names)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny_llama().modules()]


@pytest.mark.peft("safe_merge in bf16", "rounds twice", "one rounding: the nearest value to the exact sum")
def test_a_half_precision_merge_rounds_once():
    model = two_adapters(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.factors("default")
    exact = layer.weight.double() + layer.scaling["default"] * b.double() @ a.double()
    model.merge_adapter(["default"])
    torch.testing.assert_close(layer.weight.detach(), exact.to(torch.bfloat16), rtol=0.008, atol=0)
    assert (layer.weight == exact.to(torch.bfloat16)).float().mean() > 0.999


def test_disabling_a_merged_model_gives_the_base_and_then_the_same_merged_bits(ids):
    model = two_adapters(torch.bfloat16)
    with torch.no_grad():
        expected = tiny_llama().to(torch.bfloat16)(ids).logits
        model.merge_adapter()
        merged = base_bits(model)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
    assert same_bits(merged, base_bits(model))


def test_a_second_merge_goes_beside_the_first_and_one_unmerging_takes_both_back():
    model = two_adapters()
    before = base_bits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])
    step_by_step = base_bits(model)
    model.unmerge_adapter()
    assert same_bits(before, base_bits(model))
    model.merge_adapter(["default", "other"])
    for one, other in zip(step_by_step.values(), base_bits(model).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_setting_another_adapter_takes_the_merged_one_out():
    model = two_adapters()
    before = base_bits(model)
    model.merge_adapter(["default"])
    model.set_adapter("other")
    assert same_bits(before, base_bits(model))


def test_a_merged_adapter_is_not_deleted():
    model = two_adapters()
    model.merge_adapter(["other"])
    with pytest.raises(MergeError, match="Cannot delete adapter\\(s\\) \\['other'\\] while they are merged"):
        model.delete_adapter("other")


def test_an_overflow_names_the_layer_and_the_value_and_changes_nothing():
    model = get_peft_model(tiny_llama().half(), CONFIG)
    randomise(model)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    with torch.no_grad():
        layer.factors("default")[1].fill_(1e6)
    before = base_bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            MergeError,
            match=r"layers\.1\.self_attn\.v_proj: .*the largest magnitude is \d.* in torch.float16",
        ):
            merge()
    assert same_bits(before, base_bits(model))


def test_an_unknown_adapter_is_named_with_those_that_exist():
    model = two_adapters()
    with pytest.raises(
        ConfigError, match=r"Adapter nobody does not exist; the model has \['default', 'other'\]"
    ):
        model.merge_adapter(["nobody"])


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = two_adapters()
    before = base_bits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert same_bits(before, base_bits(twin))
