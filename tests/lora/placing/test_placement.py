from __future__ import annotations

import gc

import pytest
from torch import nn

from rankfold import LoraConfig, get_peft_model
from rankfold.errors import TargetError
from rankfold.lora.placing.placement import no_garbage_collection


@pytest.fixture(autouse=True)
def collector():
    assert gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_is_off_inside_and_on_after_whatever_happens():
    with no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(TargetError):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["none"]))
    assert gc.isenabled()
    gc.disable()
    with no_garbage_collection():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_somebody_has_frozen_stays_so_and_nothing_else_is(frozen):
    if frozen:
        gc.freeze()
    before = gc.get_freeze_count()
    with no_garbage_collection():
        kept = [[] for _ in range(5000)]
    assert (gc.get_freeze_count() > 0) == frozen
    assert gc.get_freeze_count() <= before
    assert len(kept) == 5000


def test_every_parameter_of_the_base_is_frozen_and_every_new_one_trained():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    )
    base = dict(net.named_parameters())
    net[2][0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="running statistics of 1 normalisation"):
        model = get_peft_model(net, LoraConfig(target_modules=["0", "2.0"], r=2))
    assert not any(parameter.requires_grad for parameter in base.values())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
