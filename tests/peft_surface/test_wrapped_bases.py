"""Adapters of a model that another library has wrapped: FSDP's first version, ``torch.compile``."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from conftest import randomise, tiny_llama
from rankfold import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from rankfold.errors import RankfoldWarning


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("targets", [["head"], ["attention"], ["out_proj"], ["attention", "head"]], ids=str)
@pytest.mark.filterwarnings("ignore:.*FSDP:FutureWarning", "ignore:.*state_dict:FutureWarning")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning", "ignore:.*NO_SHARD:UserWarning")
def test_under_fsdp_outputs_and_adapter_are_those_of_the_bare_model(targets, one_process):
    torch.manual_seed(0)
    base = Attending()
    fresh = Attending()
    fresh.load_state_dict(base.state_dict())
    x = torch.randn(5, 2, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets)).eval()
    randomise(model)
    expected, own = model(x).detach(), get_peft_model_state_dict(model)
    own = {key: tensor.clone() for key, tensor in own.items()}
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for _ in range(2):  # what FSDP writes back between two forwards
        torch.testing.assert_close(sharded(x), expected)
    found = get_peft_model_state_dict(sharded)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)
    again = get_peft_model(fresh, LoraConfig(r=2, target_modules=targets)).eval()
    assert set_peft_model_state_dict(again, found) == ([], [])
    torch.testing.assert_close(again(x), expected)


def test_biases_that_no_adapter_trains_go_into_the_base_and_that_is_said():
    """What an adapter with ``bias="all"`` saved, given to one with ``bias="none"``, as in PEFT."""

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    trained = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], bias="all"))
    randomise(trained)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1.0)
    given = get_peft_model_state_dict(trained)
    ours = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(RankfoldWarning, match="the base's own biases were set"):
        result = set_peft_model_state_dict(ours, given)
    assert result == ([], [])
    peft.set_peft_model_state_dict(theirs, dict(given))
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), trained(x))


@pytest.mark.parametrize("compiled_before", [False, True], ids=["compiled after", "compiled before"])
def test_a_compiled_base_has_the_keys_of_the_plain_one(compiled_before):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    base = torch.compile(tiny_llama(), backend="eager") if compiled_before else tiny_llama()
    model = get_peft_model(base, config)
    model = model if compiled_before else torch.compile(model, backend="eager")
    plain = get_peft_model_state_dict(get_peft_model(tiny_llama(), config))
    assert get_peft_model_state_dict(model).keys() == plain.keys()


def test_an_adapter_is_injected_into_a_compiled_model_and_found_there():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    plain = inject_adapter_in_model(config, tiny_llama())
    randomise(plain)
    given = get_peft_model_state_dict(plain)
    compiled = torch.compile(tiny_llama(), backend="eager")
    assert inject_adapter_in_model(config, compiled, state_dict=given) is compiled
    assert compiled.peft_config.keys() == {"default"}
    assert set_peft_model_state_dict(compiled, given) == ([], [])
    found = get_peft_model_state_dict(compiled)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_a_base_on_the_meta_device_is_adapted_there():
    with torch.device("meta"):
        base = tiny_llama()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.is_meta
