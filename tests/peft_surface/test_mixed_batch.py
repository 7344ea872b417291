"""A batch of several adapters, beside each adapter run alone on its rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.lora.layers.mixed import MixedForward
from rankfold.models.running.gates import fuse_gates

IDS = torch.randint(0, 60, (7, 5), generator=torch.Generator().manual_seed(3))
NAMES = ["two", "__base__", "one", "three", "two", "one", "two"]
KEPT = ("modules_to_save", "trainable_tokens_delta")
KINDS = {
    "plain": ({}, {}, {}),
    "ranks and scales": ({"r": 2}, {"r": 5, "use_rslora": True}, {"rank_pattern": {"q_proj": 7}}),
    "layers of their own": ({}, {"target_modules": ["v_proj", "o_proj"]}, {"target_modules": "all-linear"}),
    "dora": ({"use_dora": True}, {}, {"use_dora": True, "lora_alpha": 3}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, {"target_modules": ["embed_tokens"]}),
    "saved modules": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {}),
    "trainable tokens": ({"trainable_token_indices": [3, 8, 50]}, {"trainable_token_indices": [8]}, {}),
    "biases": ({"lora_bias": True}, {}, {}),
    "a base of its own": ({"init_lora_weights": "pissa"}, {}, {}),
    "other dropouts": ({"lora_dropout": 0.5}, {}, {"lora_dropout": 0.1}),
}


def three(kind: str, base: nn.Module | None = None):
    usual = {"target_modules": ["q_proj", "down_proj"], "r": 3}
    configs = [LoraConfig(**(usual | options)) for options in KINDS[kind]]
    model = get_peft_model(tiny_llama() if base is None else base, configs[0], "one")
    for name, config in zip(("two", "three"), configs[1:], strict=True):
        model.add_adapter(name, config)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{kept}.{own}" in name for own in ("one", "two", "three") for kept in KEPT):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def apart(model, ids, names, call=None):
    """What each row is with its own adapter alone."""
    call = call or (lambda rows: model(input_ids=rows).logits)
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(row[None]))
        else:
            model.set_adapter(name)
            rows.append(call(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_its_adapter_makes_of_it_alone(kind):
    model = three(kind)
    wanted = apart(model, IDS, NAMES)
    model.set_adapter("three")
    found = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - model(input_ids=IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["plain", "dora", "embeddings", "saved modules"])
def test_the_gradients_are_the_sums_of_those_of_the_rows(kind):
    model = three(kind).train()
    weight = torch.randn(*IDS.shape, 1, generator=torch.Generator().manual_seed(1))
    model.set_requires_grad(["one", "two", "three"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (model(input_ids=IDS, adapter_names=NAMES).logits * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        rows = [row for row, own in enumerate(NAMES) if own == name]
        (model(input_ids=IDS[rows]).logits * weight[rows]).sum().backward()
    assert len(found) == len(trained)
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_answered_by_its_adapters(beams):
    model = three("plain")
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "eos_token_id": 61,
    }
    generate = lambda ids, **more: model.generate(input_ids=ids, **options, **more)  # noqa: E731
    wanted = apart(model, IDS, NAMES, generate)
    assert torch.equal(generate(IDS, adapter_names=NAMES), wanted)


def test_convolutions_and_images_are_shared_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "head"]), "one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["conv"]))
    model.add_adapter("three", LoraConfig(r=4, target_modules=["head"], use_dora=True))
    randomise(model)
    model.eval()
    x = torch.randn(7, 3, 6, 6)
    wanted = apart(model, x, NAMES, model)
    torch.testing.assert_close(model(x, adapter_names=NAMES), wanted, rtol=1e-5, atol=1e-5)


def test_a_fused_block_does_not_use_the_active_adapter():
    model = three("plain", tiny_llama())
    ids = IDS.repeat(1, 32)
    wanted = apart(model, ids, NAMES)
    model.set_adapter("one")
    assert fuse_gates(model)
    with torch.enable_grad():
        found = model(input_ids=ids.repeat(4, 1), adapter_names=NAMES * 4).logits[:7]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_everything_is_as_before_when_the_forward_fails():
    model = three("plain")
    model.set_adapter("three")
    before = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match="7 and 6 respectively"):
        model(input_ids=IDS[:6], adapter_names=NAMES)
    assert not any(isinstance(m.__dict__.get("forward"), MixedForward) for m in model.modules())
    assert model.active_adapters == ["three"]
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_disabled_adapters_stay_disabled():
    model = three("plain")
    with model.disable_adapter():
        wanted = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS, adapter_names=NAMES).logits, wanted)


def test_recomputed_activations_are_refused_in_training():
    base = tiny_llama()
    base.gradient_checkpointing_enable()
    model = three("plain", base)
    model(input_ids=IDS, adapter_names=NAMES)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model.train()(input_ids=IDS, adapter_names=NAMES)
