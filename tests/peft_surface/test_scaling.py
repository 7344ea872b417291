from __future__ import annotations

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale as rescale_in_peft
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError
from rankfold.peft_surface.scaling import rescale_adapter_scale

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "use_rslora": True}


def adapted(library=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 9))
    wrap, config = (library.get_peft_model, library.LoraConfig) if library else (get_peft_model, LoraConfig)
    model = wrap(net, config(**OPTIONS))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("multiplier", [0, 0.5, 1, -2])
@pytest.mark.peft("`rescale_adapter_scale`", "same", "same")
def test_the_scale_is_multiplied_within_the_block_as_in_peft(multiplier):
    ours, theirs, x = adapted(), adapted(peft), torch.randn(3, 12)
    before = ours(x)
    with rescale_adapter_scale(ours, multiplier), rescale_in_peft(theirs, multiplier):
        torch.testing.assert_close(ours(x), theirs(x))
        assert torch.equal(ours(x), before) == (multiplier == 1)
    assert torch.equal(ours(x), before)


def test_the_scale_comes_back_after_an_error():
    model, x = adapted(), torch.randn(3, 12)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), rescale_adapter_scale(model, 3):
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)


def test_a_layers_own_scale_is_set_multiplied_and_set_back_as_in_peft():
    ours, theirs, x = adapted(), adapted(peft), torch.randn(3, 12)
    for model in (ours, theirs):
        layer = model.get_base_model()[0]
        layer.set_scale("default", 2)
        layer.scale_layer(3)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model.get_base_model()[0].unscale_layer()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("multiplier", ["2", True, float("nan"), None])
def test_what_is_no_number_is_refused(multiplier):
    with (
        pytest.raises(ConfigError, match="must be a finite number"),
        rescale_adapter_scale(adapted(), multiplier),
    ):
        pass


def test_a_model_on_which_it_would_do_nothing_is_refused():
    with pytest.raises(ConfigError, match="no LoRA layer"), rescale_adapter_scale(nn.Linear(2, 2), 2):
        pass
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="are merged"), rescale_adapter_scale(model, 2):
        pass
