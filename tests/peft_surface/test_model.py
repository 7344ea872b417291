from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from rankfold.errors import ConfigError, MergeError, RankfoldError

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> PeftModel:
    wrapped = get_peft_model(tiny_llama(), LoraConfig(**CONFIG))
    randomise(wrapped)
    return wrapped.eval()


def test_the_first_output_equals_the_base_to_the_last_bit(ids):
    base = tiny_llama()
    expected = base(ids).logits
    assert torch.equal(get_peft_model(base, LoraConfig(**CONFIG))(ids).logits, expected)


def test_only_the_factors_are_trained(model, ids):
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        assert parameter.requires_grad == ("lora_" in name)


@pytest.mark.peft("logits and gradients of a language model", "same", "same")
def test_gradients_and_logits_equal_pefts(model, ids):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG)).eval()
    source = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert not theirs.load_state_dict(source, strict=False).unexpected_keys
    losses = [m(ids, labels=ids).loss for m in (model, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.peft("`print_trainable_parameters()`", "same", "same")
def test_parameter_counts_are_pefts(model, capsys):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG))
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_merging_keeps_the_output_and_leaves_plain_layers(model, ids):
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-6)
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny_llama().modules()]
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()


def test_merged_weights_equal_pefts(model):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG))
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    expected = theirs.merge_and_unload().state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, expected[name])


def test_unloading_gives_back_the_base_bit_for_bit(model):
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.unload().state_dict().values(), tiny_llama().state_dict().values(), strict=True)
    )


def test_disable_adapter_gives_the_base_and_comes_back_after_an_error(model, ids):
    tuned = model(ids).logits
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, tuned)


def test_a_merge_that_would_not_be_finite_changes_nothing(model):
    base = model.get_base_model()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.factors("default")[1][0, 0] = float("nan")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(
        MergeError, match=r"model\.layers\.1\.mlp\.up_proj: NaNs detected in the merged weights"
    ):
        model.merge_and_unload()
    for name, tensor in base.state_dict().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(before[name]))


def test_a_tied_weight_is_not_merged_behind_the_others_back(ids):
    base = tiny_llama(tied=True)
    before = base.model.embed_tokens.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head", "q_proj"])).eval()
    randomise(model)
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected)
    assert torch.equal(base.model.embed_tokens.weight, before)


def test_a_layer_used_in_two_places_is_adapted_and_merged_once():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 4)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    randomise(model)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_the_given_config_is_not_changed():
    config = LoraConfig(**CONFIG)
    before = dataclasses.asdict(config)
    model = get_peft_model(tiny_llama(), config)
    assert dataclasses.asdict(config) == before
    assert model.peft_config["default"].target_modules == {
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    }


def test_a_model_that_carries_adapters_already_is_told_of(model, ids):
    base = model.get_base_model()
    before = tiny_llama()(ids).logits
    with (
        pytest.warns(UserWarning, match="for a second time"),
        pytest.warns(UserWarning, match="Already found a `peft_config` attribute"),
    ):
        again = get_peft_model(base, LoraConfig(**CONFIG), "again").eval()
    assert torch.equal(again(ids).logits, before)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward"])
def test_a_name_that_torch_cannot_hold_is_refused(name):
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        get_peft_model(nn.Sequential(nn.Linear(9, 9)), LoraConfig(target_modules=["0"]), adapter_name=name)


def test_the_wrapper_answers_like_pefts(model):
    assert isinstance(model, PeftModelForCausalLM)
    assert model.base_model.model is model.get_base_model()
    assert model.config.vocab_size == 49152
    assert model.active_adapters == ["default"]
    assert len(model.targeted_module_names) == 14
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_generate_speaks_with_the_adapter_on(model, ids):
    tuned = model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False)
    with model.disable_adapter():
        base = model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False)
    assert tuned.shape[1] > ids.shape[1]
    assert not torch.equal(tuned, base)


def test_a_config_in_inference_mode_trains_nothing():
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG, inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.peft("several named adapters: add, set one or several, delete", "same", "same")
def test_several_adapters_are_added_and_switched_as_in_peft(ids):
    second = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    ours = get_peft_model(tiny_llama(), LoraConfig(**CONFIG))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG))
    ours.add_adapter("second", LoraConfig(**second))
    theirs.add_adapter("second", peft.LoraConfig(**second))
    randomise(ours)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    ours.eval(), theirs.eval()
    for names in ("default", "second", ["default", "second"], ["second", "default"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
        assert trained[0] == trained[1]
        assert ours.active_adapters == theirs.active_adapters
    ours.delete_adapter("second")
    theirs.delete_adapter("second")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert ours.active_adapters == theirs.active_adapters == ["default"]


def test_a_layer_without_adapters_left_is_plain_again(ids):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("wide", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    model.delete_adapter("wide")
    kinds = {type(m).__name__ for n, m in model.get_base_model().named_modules() if n.endswith("up_proj")}
    assert kinds == {"Linear"}


@pytest.mark.peft("an adapter named `lora`", "warns, and its file does not load", "like any other name")
@pytest.mark.parametrize("name", ["lora", "lora_A", "weight", "base_layer", "a-b c", "默认"])
@pytest.mark.filterwarnings("ignore:Adapter name .lora. should not be")
def test_an_adapter_may_have_any_name_that_torch_can_hold(name, ids, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG), adapter_name=name)
    randomise(model)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_taken_name_is_refused_and_changes_nothing(model, ids):
    expected = model(ids).logits
    with pytest.raises(ConfigError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", LoraConfig(**CONFIG))
    assert torch.equal(model(ids).logits, expected)


def test_of_the_last_adapter_nothing_stays(model, ids):
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_an_adapter_loaded_beside_another_is_frozen_and_not_active(model, tmp_path, ids):
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    model.load_adapter(tmp_path, "again")
    assert model.active_adapters == ["default"]
    assert torch.equal(model(ids).logits, expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".again." in n)
    assert any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    model.set_adapter("again")
    assert torch.equal(model(ids).logits, expected)


def test_loading_an_adapter_that_does_not_fit_leaves_the_others_alone(model, tmp_path, ids):
    get_peft_model(nn.Sequential(nn.Linear(9, 9)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    expected = model(ids).logits
    with pytest.raises(RankfoldError):
        model.load_adapter(tmp_path, "strange")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.peft("the user's config object", "changed by get_peft_model", "never changed")
def test_a_config_can_be_used_twice():
    config = LoraConfig(r=2, target_modules="all-linear")
    first = get_peft_model(tiny_llama(), config)
    second = get_peft_model(nn.Sequential(nn.Linear(9, 9)), config)
    assert config.target_modules == "all-linear"
    assert len(first.targeted_module_names) == 14
    assert second.targeted_module_names == ["0"]


@pytest.mark.peft("`from_pretrained(config=, torch_device=)`", "same", "same")
def test_a_given_config_takes_the_place_of_the_one_in_the_folder(tmp_path):
    ours = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    options = {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj"]}
    mine = LoraConfig(**options)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=mine, torch_device="cpu").eval()
    other = peft.LoraConfig(**options)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, config=other, torch_device="cpu").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert not torch.allclose(loaded(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert loaded.peft_config["default"].inference_mode
