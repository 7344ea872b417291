"""The starts that look at data or at the weight, beside PEFT 0.21.2's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora import loraga as their_loraga
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda as their_preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict as their_eva
from torch import nn

import rankfold
from conftest import tiny_llama
from rankfold import (
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from rankfold.errors import ConfigError, DataError
from rankfold.lora.starts.corda import balanced

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
USUAL = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}


def batch(rows: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 49000, (rows, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def layer_of(model, path: str):
    return model.base_model.model.get_submodule(path)


def started(start: str, options: dict | None = None, library=rankfold, base: nn.Module | None = None):
    """An adapter that was started from data, in either library, and the base as it was."""
    base = tiny_llama() if base is None else base
    config = library.LoraConfig(**USUAL | (options or {}), init_lora_weights=start)
    if start == "corda":
        prepare = preprocess_corda if library is rankfold else their_preprocess_corda
        # PEFT wants a text at a time
        prepare(base, config, lambda: [base(input_ids=row[None]) for row in batch()["input_ids"]])
    if start == "lora_ga":
        prepare = preprocess_loraga if library is rankfold else their_loraga.preprocess_loraga
        prepare(base, config, lambda: [base(**batch(seed=s)).loss.backward() for s in range(3)])
    torch.manual_seed(7)
    return library.get_peft_model(base, config)


CASES = {
    "corda ipm": ("corda", {"corda_config": CordaConfig(corda_method="ipm")}),
    "corda kpm": ("corda", {"corda_config": CordaConfig(corda_method="kpm")}),
    **{
        f"lora_ga {direction} {scale}": (
            "lora_ga",
            {"lora_ga_config": LoraGAConfig(direction=direction, scale=scale)},
        )
        for direction, scale in [
            *(("ArB2r", each) for each in ("stable", "weight_svd", "gd_scale", "unit")),
            *((each, "stable") for each in ("ArBr", "A2rBr", "random")),
        ]
    },
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of PEFT's own hooks
@pytest.mark.parametrize("case", CASES)
@pytest.mark.peft("starts from data: CorDA, LoRA-GA", "same", "same")
def test_the_start_is_pefts(case):
    start, options = CASES[case]
    ours, theirs = started(start, options), started(start, options, peft)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        own, other = layer_of(ours, path), layer_of(theirs, path)
        update = [
            each.scaling["default"] * each.lora_B["default"].weight @ each.lora_A["default"].weight
            for each in (own, other)
        ]
        torch.testing.assert_close(
            update[0], update[1], rtol=1e-3, atol=1e-5 * update[1].abs().max().item() + 1e-6
        )
        torch.testing.assert_close(own.weight, other.base_layer.weight, rtol=1e-3, atol=1e-5)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_nothing_is_changed_by_the_start_and_the_base_comes_back(start):
    options = {"lora_ga_config": LoraGAConfig()} if start == "lora_ga" else {"corda_config": CordaConfig()}
    before, model = tiny_llama(), started(start, options)
    inputs = batch()
    torch.testing.assert_close(model(**inputs).logits, before(**inputs).logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before(**inputs).logits)
    assert all(
        torch.equal(dict(before.named_parameters())[n], p) for n, p in model.unload().named_parameters()
    )


@pytest.mark.parametrize("start", ["corda", "lora_ga", "pissa", "olora"])
def test_a_start_is_saved_as_a_plain_adapter_for_the_base_as_it_was(start, tmp_path):
    options = {"lora_ga": {"lora_ga_config": LoraGAConfig()}, "corda": {"corda_config": CordaConfig()}}.get(
        start
    )
    model = started(start, options)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    wanted = model(**batch()).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    for library in (rankfold, peft):
        loaded = library.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
        torch.testing.assert_close(loaded(**batch()).logits, wanted, rtol=1e-3, atol=1e-4)


def test_what_was_gathered_is_kept_in_a_file(tmp_path):
    options = {
        "corda_config": CordaConfig(cache_file=str(tmp_path / "c"), covariance_file=str(tmp_path / "v"))
    }
    first = started("corda", options)
    again = tiny_llama()
    config = LoraConfig(**USUAL, **options, init_lora_weights="corda")
    preprocess_corda(again, config)
    second = get_peft_model(again, config)
    inputs = batch()
    assert torch.equal(first(**inputs).logits, second(**inputs).logits)
    base = tiny_llama()
    config = LoraConfig(**USUAL, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step() -> None:
        base(**inputs).loss.backward()

    preprocess_loraga(base, config, train_step, tmp_path / "g")
    kept = {
        name: module._peft_loraga_grad
        for name, module in base.named_modules()
        if "_peft_loraga_grad" in vars(module)
    }
    assert not any(p.grad is not None for p in base.parameters())
    assert all(p.requires_grad for p in base.parameters())
    other = tiny_llama()
    preprocess_loraga(other, config, pytest.fail, tmp_path / "g")
    assert kept.keys() == {n for n, m in other.named_modules() if "_peft_loraga_grad" in vars(m)}
    assert all(torch.equal(other.get_submodule(name)._peft_loraga_grad, kept[name]) for name in kept)


def test_a_start_without_what_it_needs_is_refused_or_told():
    with (
        pytest.raises(ConfigError, match="run `preprocess_corda` first"),
        pytest.warns(UserWarning, match="default"),
    ):
        get_peft_model(tiny_llama(), LoraConfig(**USUAL, init_lora_weights="corda"))
    with pytest.warns(UserWarning, match="no gradients were gathered for 8 layers"):
        get_peft_model(
            tiny_llama(), LoraConfig(**USUAL, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        )
    with pytest.raises(ConfigError, match="If you want to use LoRA-GA"):
        preprocess_loraga(tiny_llama(), LoraConfig(**USUAL), lambda: None)


def eva_config(**eva) -> dict:
    return {**USUAL, "init_lora_weights": "eva", "eva_config": EvaConfig(**eva)}


def structured() -> nn.Module:
    """A base whose inputs have directions of falling weight, as real ones have."""
    base = tiny_llama()
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(0.7 ** torch.arange(32))
        for layer in base.model.layers:
            layer.mlp.up_proj.weight.mul_(0.7 ** torch.arange(40)[:, None])
            layer.self_attn.v_proj.weight.mul_(0.7 ** torch.arange(16)[:, None])
    return base


def ranks(found: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: len(rows) for name, rows in found.items()}


@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.peft("starts from data: EVA", "same", "same")
def test_evas_directions_and_ranks_are_pefts(rho, whiten):
    """On one batch, which PEFT reads again until its decomposition settles."""
    data = [batch(40)]
    found = get_eva_state_dict(structured(), data, LoraConfig(**eva_config(rho=rho, whiten=whiten)))
    wanted = their_eva(
        structured(), data, peft.LoraConfig(**eva_config(rho=rho, whiten=whiten)), show_progress_bar=False
    )
    assert ranks(found) == ranks(wanted)
    assert sum(ranks(found).values()) == 4 * len(found)
    for name, rows in found.items():
        likeness = nn.functional.cosine_similarity(rows, wanted[name]).abs()
        assert likeness.min() > 0.98, name
        if not whiten:
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)


def test_evas_directions_are_those_of_all_rows():
    data = [batch(6, seed) for seed in range(9)]
    found = get_eva_state_dict(tiny_llama(), data, LoraConfig(**eva_config(rho=1.0, tau=1.0)))
    given: list[torch.Tensor] = []
    base, name = tiny_llama(), "model.layers.1.self_attn.o_proj"
    base.get_submodule(name).register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    for each in data:
        base(**each)
    seen = [
        rows[(each["attention_mask"].bool() & (each["labels"] != -100))]
        for rows, each in zip(given, data, strict=True)
    ]
    rows = torch.cat(seen).double()
    nearest = torch.linalg.svd(rows - rows.mean(0)).Vh[:4]
    torch.testing.assert_close(
        (found[name].double() @ nearest.T).abs(), torch.eye(4).double(), rtol=0, atol=1e-4
    )


def test_an_adapter_is_started_by_eva_and_loaded_by_both(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(**eva_config(rho=3.0)))
    data = [batch(20, seed) for seed in range(4)]
    found = get_eva_state_dict(model, data)
    initialize_lora_eva_weights(model, eva_state_dict=found)
    kept = {name: rank for name, rank in ranks(found).items() if rank}
    assert len(kept) < len(found)  # one at least got no rank
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "r") and hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == kept
    assert {round(layer.scaling["default"], 6) for layer in layers.values()} == {1.5}
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, found[name])
        assert layer.lora_A["default"].weight.requires_grad
    before = tiny_llama()
    assert torch.equal(model(**batch()).logits, before(**batch()).logits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    for library in (rankfold, peft):
        loaded = library.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_eva_says_what_is_wrong():
    model = get_peft_model(tiny_llama(), LoraConfig(**eva_config()))
    with pytest.raises(DataError, match="dataloader is empty"):
        initialize_lora_eva_weights(model, [])
    with pytest.raises(ConfigError, match="dataloader is required"):
        initialize_lora_eva_weights(model)
    with pytest.raises(DataError, match="were given no rows"):
        labels = {**batch(), "labels": torch.full((12, 20), -100)}
        initialize_lora_eva_weights(model, [labels])
    plain = get_peft_model(tiny_llama(), LoraConfig(**USUAL))
    with pytest.raises(ConfigError, match="can only be used with"):
        initialize_lora_eva_weights(plain, [batch()])
    with pytest.warns(UserWarning, match="were not found in the eva state_dict"):
        initialize_lora_eva_weights(model, eva_state_dict={})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_makes_up_for_the_rounding(bits, iterations):
    options = {"loftq_config": {"loftq_bits": bits, "loftq_iter": iterations}, "r": 8}
    before, model = tiny_llama(), started("loftq", options)
    path = "model.layers.0.self_attn.q_proj"
    layer, whole = layer_of(model, path), before.get_submodule(path).weight
    update = layer.get_delta_weight("default")
    left = torch.linalg.matrix_norm(whole - layer.weight - update)
    if bits == 4:
        rounded = dequantize_4bit(*quantize_4bit(whole.detach(), quant_type="nf4", compress_statistics=False))
    else:
        scale = whole.abs().amax(1, keepdim=True) / 127
        rounded = (whole / scale).round() * scale
    plain = torch.linalg.matrix_norm(whole - rounded)
    assert left < 0.75 * plain
    if iterations == 1:
        torch.testing.assert_close(layer.weight, rounded, rtol=1e-5, atol=1e-6)
        nearest = torch.linalg.svdvals((whole - rounded).double())
        assert left.item() == pytest.approx(nearest[8:].square().sum().sqrt().item(), rel=1e-3)
    assert torch.equal(model.unload().get_submodule(path).weight, whole)


def test_an_adapter_of_loftq_is_loaded_onto_the_base_rounded_again(tmp_path):
    model = started("loftq", {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits)
    with pytest.raises(ConfigError, match="LoftQ rounded the base"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path)


def test_layers_of_one_input_are_looked_at_once():
    from rankfold.lora.starts.moments import Inputs, Watch

    base = tiny_llama()
    names = [f"model.layers.0.self_attn.{side}_proj" for side in "qkvo"]
    watch = Watch(base, {n: base.get_submodule(n) for n in names}, lambda x, _: x.flatten(0, -2))
    inputs = Inputs(watch)
    with inputs.gathered():
        for seed in range(3):
            base(input_ids=batch(seed=seed)["input_ids"])
    assert set(inputs.moments) == {names[0], names[3]}
    assert inputs[names[2]] is inputs[names[0]]
    assert inputs[names[0]].count == 3 * 12 * 20
    clone = copy.deepcopy(base)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in clone.modules())


def test_balanced_factors_have_the_same_product_and_rows_as_long_as_columns():
    generator = torch.Generator().manual_seed(3)
    lora_a, lora_b = torch.randn(4, 9, generator=generator) / 50, 20 * torch.randn(7, 4, generator=generator)
    lora_a[2], lora_b[:, 2] = 0, 0  # a part of the weight that is none
    even_a, even_b = balanced(lora_a, lora_b)
    torch.testing.assert_close(even_b @ even_a, lora_b @ lora_a)
    torch.testing.assert_close(even_a.norm(dim=1), even_b.norm(dim=0))
