from __future__ import annotations

import copy

import peft
import peft.functional
import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from rankfold.errors import AdapterError, ConfigError, MergeError, RankfoldWarning, TargetError
from rankfold.lora.placing import merging
from rankfold.peft_surface import functional

OPTIONS = [
    {"r": 4, "target_modules": "all-linear"},
    {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 4]},
]
# What PEFT's own calls say of the cases above.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 7), generator=torch.Generator().manual_seed(3))


def change(model: nn.Module) -> None:
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save." in name or "token_adapter." in name:
                parameter.add_(0.125)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "injected"])
@pytest.mark.peft("`get_peft_model_state_dict`, `set_peft_model_state_dict`", "same", "same")
def test_the_state_dict_is_pefts_in_both_directions(options, wrapped, ids):
    base = tiny_llama()
    if wrapped:
        ours = get_peft_model(base, LoraConfig(**options)).eval()
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).eval()
    else:
        ours = inject_adapter_in_model(LoraConfig(**options), base)
        assert ours is base
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**options), tiny_llama()).eval()
    change(ours)
    given = get_peft_model_state_dict(ours)
    result = peft.set_peft_model_state_dict(theirs, dict(given))
    assert not result.unexpected_keys
    own = peft.get_peft_model_state_dict(theirs)
    assert given.keys() == own.keys()
    assert all(torch.equal(given[key], own[key]) for key in own)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)

    fresh = tiny_llama()
    back = (
        get_peft_model(fresh, LoraConfig(**options)).eval()
        if wrapped
        else inject_adapter_in_model(LoraConfig(**options), fresh)
    )
    assert set_peft_model_state_dict(back, own) == ([], [])
    torch.testing.assert_close(back(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_keys_without_counterpart_are_returned_under_pefts_names():
    options = {"r": 2, "target_modules": ["q_proj"]}
    ours = get_peft_model(tiny_llama(), LoraConfig(**options))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
    given = get_peft_model_state_dict(ours)
    del given[sorted(given)[0]]
    given["base_model.model.model.other.lora_A.weight"] = torch.zeros(2, 2)
    found = set_peft_model_state_dict(ours, given)
    expected = peft.set_peft_model_state_dict(theirs, given)
    assert found.unexpected_keys == expected.unexpected_keys
    assert found.missing_keys == [key for key in expected.missing_keys if "lora_" in key]
    assert len(found.missing_keys) == len(found.unexpected_keys) == 1


def test_a_misshapen_tensor_is_refused_or_left_out_with_a_warning():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    before = copy.deepcopy(get_peft_model_state_dict(model))
    given = {key: tensor + 1 for key, tensor in before.items()}
    wrong = sorted(given)[0]
    given[wrong] = torch.zeros(3, 3)
    with pytest.raises(AdapterError, match=rf"size mismatch for {wrong}"):
        set_peft_model_state_dict(model, given)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.warns(UserWarning, match=rf"not loaded(.|\n)*size mismatch for {wrong}"):
        set_peft_model_state_dict(model, given, ignore_mismatched_sizes=True)
    after = get_peft_model_state_dict(model)
    assert torch.equal(after[wrong], before[wrong])
    assert all(torch.equal(after[key], given[key]) for key in before.keys() - {wrong})


def test_values_that_are_not_finite_are_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    given = {key: torch.full_like(t, torch.nan) for key, t in get_peft_model_state_dict(model).items()}
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        set_peft_model_state_dict(model, given)


def test_values_are_taken_from_a_given_state_dict():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    twice = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    given = get_peft_model_state_dict(model, twice)
    plain = get_peft_model_state_dict(model)
    assert all(torch.equal(given[key], plain[key] * 2) for key in plain)
    del twice["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    with pytest.warns(RankfoldWarning, match=r"lacks tensors(.|\n)*layers.0.self_attn.q_proj.lora_A.default"):
        assert len(get_peft_model_state_dict(model, twice)) == len(plain) - 1


def test_the_adapter_is_chosen_by_name():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    keys = get_peft_model_state_dict(model, adapter_name="second")
    assert {tensor.shape[0] for key, tensor in keys.items() if "lora_A" in key} == {3}
    assert all("v_proj" in key and "second" not in key for key in keys)
    for call in (
        get_peft_model_state_dict,
        lambda m, adapter_name: set_peft_model_state_dict(m, {}, adapter_name),
    ):
        with pytest.raises(
            ConfigError, match=r"Adapter third does not exist; the model has \['default', 'second'\]"
        ):
            call(model, adapter_name="third")


def test_injecting_keeps_the_object_freezes_the_base_and_notes_the_config(ids):
    base = tiny_llama()
    expected = base(ids).logits
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base)
    assert model is base
    assert torch.equal(model(ids).logits, expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }
    assert list(model.peft_config) == ["default"]


def test_a_second_injection_adds_an_adapter_and_makes_it_the_active_one_as_in_peft(ids):
    ours, theirs = tiny_llama(), tiny_llama()
    for name, target in (("default", "q_proj"), ("second", "v_proj")):
        ours = inject_adapter_in_model(LoraConfig(r=2, target_modules=[target]), ours, name)
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target]), theirs, name)
    randomise(ours)
    for name in ("default", "second"):
        peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours, adapter_name=name), name)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default", "second"]
    # PEFT leaves the first adapter trainable, though it is not active any more.
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in ours.named_parameters() if ".second." in n}


def test_a_state_dict_says_which_layers_to_adapt():
    source = inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), tiny_llama()
    )
    keys = get_peft_model_state_dict(source)
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        model = inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), tiny_llama(), state_dict=keys)
    assert get_peft_model_state_dict(model).keys() == keys.keys()


def test_a_failed_injection_changes_nothing():
    model = tiny_llama()
    with pytest.raises(TargetError):
        inject_adapter_in_model(LoraConfig(target_modules=["nothing"]), model)
    assert "peft_config" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())


def injected(base: nn.Module, *names: str, **options) -> nn.Module:
    """``base`` with an adapter for each name, of different values, and no wrapper."""
    for seed, name in enumerate(names):
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        inject_adapter_in_model(config, base, name)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in get_peft_model_state_dict(base, adapter_name=name).items():
            if "lora_" in key:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return base


def in_peft(*names: str) -> nn.Module:
    base = tiny_llama()
    for seed, name in enumerate(names):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), base, name)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(tensor.shape, generator=generator)
            for key, tensor in get_peft_state(base, name).items()
        }
        peft.set_peft_model_state_dict(base, tensors, adapter_name=name)
    return base.eval()


def get_peft_state(base: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(base, adapter_name=name)


FUNCTIONAL = pytest.mark.peft(
    "`functional`: `set_adapter`, `delete_adapter`, `cast_adapter_dtype`, `set_requires_grad`",
    "same; the last adapter's wrappers stay",
    "same; nothing stays",
)


@FUNCTIONAL
def test_adapters_without_a_wrapper_are_set_and_deleted_as_in_peft(ids):
    ours, theirs = injected(tiny_llama(), "a", "b", "c"), in_peft("a", "b", "c")
    for names in ("a", "b", ["a", "c"]):
        functional.set_adapter(ours, names)
        peft.functional.set_adapter(theirs, names)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
        assert trained[0] == trained[1]
    functional.set_adapter(ours, "c", inference_mode=True)
    assert not any(p.requires_grad for p in ours.parameters())
    functional.set_adapter(ours, "b")
    peft.functional.set_adapter(theirs, "b")
    assert (
        functional.delete_adapter(ours, "a")
        == peft.functional.delete_adapter(theirs, "a", prefix="lora_")
        == ["b"]
    )
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert [*ours.peft_config] == ["b", "c"]
    assert functional.delete_adapter(ours, "b") == ["c"]
    assert functional.delete_adapter(ours, "c") is None
    assert torch.equal(ours(ids).logits, tiny_llama()(ids).logits)
    assert type(ours.model.layers[0].self_attn.q_proj) is nn.Linear
    injected(ours, "a")


def test_a_wrapped_model_is_taken_by_the_same_functions(ids):
    ours = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).eval()
    ours.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    functional.set_adapter(ours, "b")
    assert ours.active_adapters == ["b"]
    assert functional.delete_adapter(ours, "b") == ["default"]
    assert functional.delete_adapter(ours, "default") is None


def test_what_is_not_there_or_merged_cannot_be_set_or_deleted():
    ours = injected(tiny_llama(), "a")
    calls = (
        functional.set_adapter,
        functional.delete_adapter,
        functional.cast_adapter_dtype,
    )
    for call in calls:
        with pytest.raises(ConfigError, match="not exist|not found|no adapter"):
            call(ours, "b")
    merging.merge(ours, ["a"])
    with pytest.raises(MergeError, match="while they are merged"):
        functional.delete_adapter(ours, "a")


@FUNCTIONAL
def test_half_precision_factors_are_cast_as_in_peft():
    made = {}
    for who in (peft, None):
        base = tiny_llama()
        inject = peft.inject_adapter_in_model if who else inject_adapter_in_model
        kind = peft.LoraConfig if who else LoraConfig
        inject(kind(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]), base)
        base.to(torch.bfloat16)
        cast = peft.functional.cast_adapter_dtype if who else functional.cast_adapter_dtype
        cast(base, "default", autocast_adapter_dtype=False)
        assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
        cast(base, "default")
        read = peft.get_peft_model_state_dict if who else get_peft_model_state_dict
        made[who] = {key: tensor.dtype for key, tensor in read(base).items()}
    assert made[None] == made[peft]
    assert {*made[None].values()} == {torch.bfloat16, torch.float32}


@FUNCTIONAL
def test_training_is_switched_on_and_off_by_name():
    ours = injected(tiny_llama(), "a", "b")
    functional.set_requires_grad(ours, ["a", "b"])
    assert all(p.requires_grad == ("lora_" in name) for name, p in ours.named_parameters())
    functional.set_requires_grad(ours, "a", requires_grad=False)
    assert all(p.requires_grad == (".b." in name) for name, p in ours.named_parameters())
