"""Routing among adapters, beside PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import arrow as theirs_arrow
from peft.tuners.lora.config import ArrowConfig as TheirArrowConfig

from conftest import randomise, tiny_llama
from rankfold import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from rankfold.errors import ConfigError, MergeError

IDS = torch.randint(3, 400, (2, 7), generator=torch.Generator().manual_seed(3))
USUAL = {"r": 3, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture
def paths(tmp_path):
    """Four adapters, whose updates each have one direction far above the others: PEFT's fifteen steps of
    power iteration find such a one."""
    for place in range(4):
        model = get_peft_model(tiny_llama(), LoraConfig(**USUAL, lora_alpha=2 + place))
        randomise(model, seed=place)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_A" in name:
                    tensor[0] *= 30
        model.save_pretrained(tmp_path / str(place))
    return [str(tmp_path / str(place)) for place in range(4)]


@pytest.mark.parametrize("general", [False, True], ids=["plain", "general knowledge subtracted"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.peft("Arrow routing (`create_arrow_model`)", "same", "same")
def test_tokens_are_routed_as_in_peft(paths, general, top_k):
    options = {"top_k": top_k, "router_temperature": 0.7, "use_gks": general, "rng_seed": 1}
    more = {"general_adapter_paths": paths[3:]} if general else {}
    ours = create_arrow_model(tiny_llama(), paths[:3], ArrowConfig(**options), **more)
    theirs = theirs_arrow.create_arrow_model(tiny_llama(), paths[:3], TheirArrowConfig(**options), **more)
    assert isinstance(theirs, peft.PeftModel)
    with torch.no_grad():
        found, wanted = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    ours.set_adapter("task_1")
    assert not torch.allclose(found, ours(input_ids=IDS).logits, atol=1e-2)


def test_the_experts_stay_what_they_are(paths):
    model = create_arrow_model(
        tiny_llama(), paths[:2], ArrowConfig(use_gks=True), general_adapter_paths=paths[2:]
    )
    before = {key: tensor.clone() for key, tensor in model.named_parameters() if "lora_" in key}
    model(input_ids=IDS)
    assert all(torch.equal(dict(model.named_parameters())[key], tensor) for key, tensor in before.items())


def test_an_adapter_that_is_loaded_later_is_an_expert_too(paths):
    all_at_once = create_arrow_model(tiny_llama(), paths[:3], ArrowConfig(top_k=2))
    later = create_arrow_model(tiny_llama(), paths[:2], ArrowConfig(top_k=2))
    later(input_ids=IDS)
    later.load_adapter(paths[2], "new")
    torch.testing.assert_close(later(input_ids=IDS).logits, all_at_once(input_ids=IDS).logits)


def test_a_router_is_not_merged_and_wants_like_experts(paths, tmp_path):
    model = create_arrow_model(tiny_llama(), paths[:2], ArrowConfig())
    with pytest.raises(MergeError, match="Cannot merge an active Arrow router"):
        model.merge_and_unload()
    other = get_peft_model(tiny_llama(), LoraConfig(**USUAL | {"r": 5}))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"rank mismatch: \[5\] != \[3\]"):
        create_arrow_model(tiny_llama(), [paths[0], str(tmp_path / "other")], ArrowConfig())
    with pytest.raises(ConfigError, match="at least one adapter path"):
        create_arrow_model(tiny_llama(), [], ArrowConfig())
    with pytest.raises(ConfigError, match="general LoRA paths"):
        create_arrow_model(tiny_llama(), paths[:1], ArrowConfig(use_gks=True))
