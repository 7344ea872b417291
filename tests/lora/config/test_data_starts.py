from __future__ import annotations

import json
import warnings
from contextlib import suppress
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError
from rankfold.lora.config import data_starts as subconfigs
from rankfold.lora.config.data_starts import DATA_STARTS

TARGETS = ["q_proj", "v_proj"]
# What each start is told in the tests: PEFT's object, and the same as a dictionary.
TOLD = {
    "loftq": (peft.LoftQConfig(loftq_bits=8, loftq_iter=2), {"loftq_bits": 8, "loftq_iter": 2}),
    "eva": (peft.EvaConfig(rho=1.0, whiten=True), {"rho": 1.0, "whiten": True}),
    "corda": (CordaConfig(corda_method="kpm"), {"corda_method": "kpm"}),
    "lora_ga": (LoraGAConfig(direction="ArBr", stable_gamma=4), {"direction": "ArBr", "stable_gamma": 4}),
}


def options(start: str, told: object) -> dict:
    return {"r": 2, "target_modules": TARGETS, "init_lora_weights": start, DATA_STARTS[start][0]: told}


def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


def read(folder) -> dict:
    content = json.loads((folder / "adapter_config.json").read_text())
    return content | {"target_modules": sorted(content["target_modules"])}


def peft_config(start: str) -> peft.LoraConfig:
    if start != "loftq":
        return peft.LoraConfig(**options(start, TOLD[start][0]))
    # PEFT's class asks for scipy, which nothing else here needs; its writer does not.
    config = peft.LoraConfig(r=2, target_modules=TARGETS)
    config.init_lora_weights, config.loftq_config = "loftq", vars(TOLD[start][0]).copy()
    return config


def started_by_peft(start: str) -> peft.PeftModel:
    """An adapter that PEFT started from data, then trained by chance."""
    base, config = tiny_llama(), peft_config(start)
    if start == "corda":
        for name, layer in base.named_modules():
            if name.rpartition(".")[2] in TARGETS:  # what preprocess_corda leaves there
                u, s, v = torch.svd_lowrank(layer.weight.detach(), q=2)
                layer.eigens = SimpleNamespace(U_WC=u, S_WC=s, V_WC=v)
    if start == "lora_ga":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook")
            preprocess_loraga(base, config, lambda: loss(base).backward())
    if start == "loftq":  # its base, quantised as by hand
        config.init_lora_weights = True
        for name, layer in base.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                layer.weight.data = (layer.weight.data * 100).round() / 100
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization")
        theirs = peft.get_peft_model(base, config).eval()
    config.init_lora_weights = start
    randomise(theirs)
    return theirs


def loss(base: torch.nn.Module) -> torch.Tensor:
    return base(ids(), labels=ids()).loss


def base_of(theirs: peft.PeftModel) -> torch.nn.Module:
    """The base as PEFT's start left it."""
    state = theirs.get_base_model().state_dict()
    base = tiny_llama()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k})
    return base


@pytest.mark.parametrize("start", TOLD)
def test_fields_and_defaults_of_the_sub_configs_are_pefts(start):
    theirs = type(TOLD[start][0])()
    _, ours = DATA_STARTS[start]
    assert ours.__name__ == type(theirs).__name__
    assert vars(ours()) == vars(theirs)


@pytest.mark.parametrize("start", TOLD)
@pytest.mark.parametrize("form", ["PEFT's object", "dictionary", "our object"])
@pytest.mark.peft("sub-configs of LoftQ, EVA, CorDA and LoRA-GA", "same", "same: read, checked and written")
def test_a_sub_config_is_written_as_by_peft_and_read_back(tmp_path, start, form):
    theirs, words = TOLD[start]
    ours = {"PEFT's object": theirs, "dictionary": words, "our object": DATA_STARTS[start][1](**words)}[form]
    peft_config(start).save_pretrained(tmp_path / "theirs")
    LoraConfig(**options(start, ours)).save_pretrained(tmp_path / "ours")
    assert read(tmp_path / "ours") == read(tmp_path / "theirs")
    LoraConfig.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == read(tmp_path / "theirs")
    if start != "loftq":
        again = peft.LoraConfig.from_pretrained(tmp_path / "ours")
        assert getattr(again, DATA_STARTS[start][0]) == theirs


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_the_defaults_are_filled_in_where_peft_fills_them_in(start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraConfig(init_lora_weights=start).to_dict()
    assert LoraConfig(init_lora_weights=start).to_dict() == theirs


@pytest.mark.peft("an adapter with an EVA start, loaded", "same", "same")
def test_an_adapter_started_by_eva_goes_both_ways(tmp_path):
    theirs = started_by_peft("eva")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(ids()).logits)
    ours.save_pretrained(tmp_path / "ours")
    assert read(tmp_path / "ours") == read(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
@pytest.mark.peft(
    "an adapter with a CorDA or LoRA-GA start, loaded",
    "LoRA-GA: on the original base without a word, which is wrong; CorDA: an error",
    "refused; on the base as the start left it right with allow={'base'}",
)
def test_a_start_that_changed_the_base_needs_that_base(tmp_path, start):
    theirs = started_by_peft(start)
    theirs.save_pretrained(tmp_path / "theirs")
    base = tiny_llama()
    before = [value.clone() for value in base.state_dict().values()]
    with pytest.raises(AdapterError, match=f"init_lora_weights='{start}' changed the base weights"):
        PeftModel.from_pretrained(base, tmp_path / "theirs", allow=())
    assert all(torch.equal(a, b) for a, b in zip(before, base.state_dict().values(), strict=True))
    with pytest.warns(UserWarning, match="changed the base weights"):
        ours = PeftModel.from_pretrained(base_of(theirs), tmp_path / "theirs", allow={"base"})
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(ids()).logits)
    ours.save_pretrained(tmp_path / "ours")
    assert read(tmp_path / "ours") == read(tmp_path / "theirs")


def test_peft_loads_a_lora_ga_adapter_on_the_wrong_base_without_a_word(tmp_path):
    theirs = started_by_peft("lora_ga")
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert (again(ids()).logits - theirs(ids()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("start", TOLD)
def test_a_sub_config_without_its_start_is_told_of_and_has_no_effect(start):
    with pytest.warns(UserWarning, match=f"`{DATA_STARTS[start][0]}` specified but will be ignored"):
        config = LoraConfig(**{**options(start, TOLD[start][1]), "init_lora_weights": True})
    get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("eva_config", {"rho": 0.5, "tau": "x"}, "`rho` must be >= 1.0, got 0.5; `tau` must be"),
        ("eva_config", {"roh": 2}, r"unknown option 'roh' \(did you mean 'rho'\?\)"),
        ("eva_config", 7, "must be a `EvaConfig`, a dict, or None"),
        ("eva_config", {"use_label_mask": 1}, "use_label_mask must be True or False"),
        ("eva_config", {"label_mask_value": 0.5}, "label_mask_value must be a whole number"),
        ("corda_config", {"corda_method": "best"}, "corda_method must be one of ipm, kpm"),
        ("corda_config", {"cache_file": 7}, "cache_file must be a path or None"),
        ("loftq_config", {"loftq_bits": True}, "loftq_bits must be a whole number"),
        ("loftq_config", peft.EvaConfig(), "must be a `LoftQConfig`"),
        ("lora_ga_config", {"scale": ["unit"]}, "scale must be one of stable"),
        ("lora_ga_config", {"stable_gamma": float("nan")}, "stable_gamma must be"),
    ],
)
def test_a_sub_config_that_cannot_be_meant_is_refused(name, told, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(init_lora_weights=name.removesuffix("_config"), **{name: told})


def test_the_users_own_object_is_not_shared():
    mine = subconfigs.EvaConfig()
    config = LoraConfig(init_lora_weights="eva", eva_config=mine)
    mine.rho = 5.0
    assert config.eva_config.rho == 2.0


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.floats(), st.text(), st.lists(st.integers()))))
def test_any_dictionary_is_read_or_refused(told):
    for start, (name, _) in DATA_STARTS.items():
        with suppress(ConfigError):
            kept = getattr(LoraConfig(init_lora_weights=start, **{name: told}), name)
            assert all((kept if isinstance(kept, dict) else vars(kept))[key] == told[key] for key in told)
