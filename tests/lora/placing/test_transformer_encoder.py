from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model, inject_adapter_in_model
from rankfold.peft_surface.functional import delete_adapter

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
TARGETS = [["linear1"], ["layers.1.linear2"], ["linear1", "self_attn"], ["self_attn"]]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


def padded() -> dict[str, torch.Tensor]:
    src = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    return {
        "src": src,
        "src_key_padding_mask": torch.tensor([[False] * n + [True] * (5 - n) for n in (3, 5, 2)]),
    }


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.peft(
    "a padded `nn.TransformerEncoder` in eval mode, with gradients",
    "AssertionError of torch",
    "works, and is trained",
)
def test_a_padded_batch_gives_the_merged_models_output_with_and_without_gradients(targets):
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules=targets)).eval()
    randomise(model)
    kept = ~padded()["src_key_padding_mask"]
    outputs = [model(**padded())[kept]]
    outputs[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        outputs.append(model(**padded())[kept])
        outputs.append(copy.deepcopy(model).merge_and_unload()(**padded())[kept])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


def test_without_gradients_padding_comes_out_as_zeros_as_before():
    plain, model = encoder(), get_peft_model(encoder(), LoraConfig(r=2, target_modules=["linear1"])).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**padded()), plain(**padded()))
        assert not model(**padded())[padded()["src_key_padding_mask"]].any()


def test_the_encoders_own_choice_comes_back():
    for leave in ("unload", "merge_and_unload"):
        base = encoder()
        getattr(get_peft_model(base, LoraConfig(r=2, target_modules=["linear1"])), leave)()
        assert base.use_nested_tensor is True
    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear1"]), encoder())
    assert base.use_nested_tensor is not True
    delete_adapter(base, "default")
    assert base.use_nested_tensor is True


def test_an_encoder_that_packs_nothing_is_left_alone():
    base = encoder()
    base.use_nested_tensor = False
    get_peft_model(base, LoraConfig(r=2, target_modules=["linear1"]))
    assert base.use_nested_tensor is False
