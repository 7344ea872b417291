"""Calls of PEFT's whose outcome is compared with PEFT's own, on adapters of equal values."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import rankfold
from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model

BY_FACTOR = [f"{method}_by_factor" for method in ("linear", "ties", "dare_linear", "magnitude_prune")]
OPTIONS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def both(tmp_path):
    """The same two adapters of random values on the same base, here and in PEFT."""
    ours = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS), "one")
    ours.add_adapter("two", LoraConfig(**OPTIONS))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "one", "one")
    theirs.load_adapter(tmp_path / "two", "two")
    return ours.eval(), theirs.eval()


@pytest.mark.peft("a batch for several adapters (`adapter_names`)", "same", "same")
def test_each_row_of_a_batch_goes_through_its_own_adapter(both):
    ours, theirs = both
    ids = torch.arange(12).reshape(3, 4)
    names = ["two", "__base__", "one"]
    mixed = ours(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(mixed, theirs(input_ids=ids, adapter_names=names).logits)
    assert not torch.allclose(mixed, ours(input_ids=ids).logits, atol=1e-3)
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(input_ids=ids, adapter_names=["one", "three", "two"])


@pytest.mark.parametrize("how", ["cat", "svd", *BY_FACTOR])
@pytest.mark.peft(
    "`add_weighted_adapter`",
    "`linear`, `ties` and such combine A with A and B with B",
    "the updates themselves; PEFT's way is `linear_by_factor`, `ties_by_factor` and such",
)
def test_a_weighted_adapter_is_pefts(both, how):
    ids = torch.arange(8).reshape(2, 4)
    outputs = []
    for model in both:
        torch.manual_seed(0)
        more = {} if how in ("linear_by_factor", "cat", "svd") else {"density": 0.5}
        own = how if model is both[0] else how.removesuffix("_by_factor")
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type=own, **more)
        model.set_adapter("sum")
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.peft("`hotswap_adapter`", "same", "same")
def test_a_hotswapped_adapter_computes_what_a_loaded_one_does(both, tmp_path):
    from rankfold.utils.hotswap import hotswap_adapter

    ours, _ = both
    ids = torch.arange(8).reshape(2, 4)
    ours.set_adapter("two")
    expected = ours(input_ids=ids).logits
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one", "one").eval()
    hotswap_adapter(alone, tmp_path / "two", "one")
    assert torch.equal(alone(input_ids=ids).logits, expected)


@pytest.mark.peft("`create_loraplus_optimizer`, `create_lorafa_optimizer`", "same", "same")
def test_the_optimizers_step_as_pefts(both):
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    import rankfold.optimizers as own

    ids = torch.arange(8).reshape(2, 4)
    for make, theirs_make, options in (
        (own.create_loraplus_optimizer, create_loraplus_optimizer, {"loraplus_lr_ratio": 16.0}),
        (own.create_lorafa_optimizer, create_lorafa_optimizer, {"r": 3, "lora_alpha": 5}),
    ):
        losses = []
        for adapted, maker in zip(both, (make, theirs_make), strict=True):
            model = copy.deepcopy(adapted)
            model.delete_adapter("two")  # beside another adapter PEFT 0.21.2 raises TypeError
            model.set_adapter("one")
            extra = {"optimizer_cls": torch.optim.AdamW} if "loraplus_lr_ratio" in options else {}
            optimizer = maker(model=model, lr=1e-2, **options, **extra)
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.peft("a state of LoRA-FA's optimiser, both ways", "same", "same")
def test_a_lora_fa_run_goes_on_with_the_state_that_peft_saved(both):
    from peft.optimizers import create_lorafa_optimizer

    import rankfold.optimizers as own

    ids = torch.arange(8).reshape(2, 4)
    models = [copy.deepcopy(model) for model in both]
    for model in models:
        model.delete_adapter("two")
        model.set_adapter("one")
    made = [
        make(model=model, lr=1e-2, r=3, lora_alpha=5)
        for make, model in zip((own.create_lorafa_optimizer, create_lorafa_optimizer), models, strict=True)
    ]

    def step(k: int) -> None:
        models[k](input_ids=ids, labels=ids).loss.backward()
        made[k].step()
        made[k].zero_grad()

    for k in range(2):
        step(k)
    states = [optimizer.state_dict()["state"] for optimizer in made]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key].keys() == states[1][key].keys() for key in states[0])
    for k in range(2):  # each goes on with the other's
        made[k].load_state_dict(copy.deepcopy(made[1 - k].state_dict()))
    for k in range(2):
        step(k)
    losses = [model(input_ids=ids, labels=ids).loss.item() for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_lora_fa_pairs_the_factors_of_each_adapter_by_name(both):
    from rankfold.optimizers import create_lorafa_optimizer

    ours, _ = both
    ours.set_adapter("two")
    factors = ours.base_model.model.model.layers[0].self_attn.q_proj
    before = factors.lora_B["two"].weight.detach().clone()
    optimizer = create_lorafa_optimizer(ours, 3, 5, 1e-2)
    ids = torch.arange(8).reshape(2, 4)
    ours(input_ids=ids, labels=ids).loss.backward()
    gradient, lora_a = factors.lora_B["two"].weight.grad, factors.lora_A["two"].weight.detach()
    wanted = gradient @ torch.linalg.inv(lora_a @ lora_a.T)
    optimizer.step()
    moved = before - factors.lora_B["two"].weight.detach()
    assert torch.equal(moved.sign()[wanted.abs() > 1e-5], wanted.sign()[wanted.abs() > 1e-5])


def test_a_model_of_ours_is_one_of_pefts_to_who_asks_and_a_plain_module_is_not():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(model, peft.PeftModel)
    assert not isinstance(nn.Linear(1, 1), rankfold.PeftModel)


def test_partly_merged_the_other_active_adapter_still_counts(both):
    ours, _ = both
    ids = torch.arange(8).reshape(2, 4)
    ours.set_adapter(["one", "two"])
    expected = ours(input_ids=ids).logits
    ours.merge_adapter(["one"])
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_loaded_to_be_trained_is_trained(both, tmp_path):
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one", "one")
    alone.load_adapter(tmp_path / "two", "two", is_trainable=True)
    assert any(p.requires_grad for name, p in alone.named_parameters() if ".two." in name)


def test_a_pattern_that_matches_nothing_is_told_of():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(rankfold.RankfoldWarning, match=r"rank_pattern keys did not match"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], rank_pattern={"nothing": 2}))
