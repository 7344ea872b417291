from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError

PATTERNS = {"rank_pattern": {"2": 2}, "alpha_pattern": {"2": 5}}
OPTIONS = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "olora", **PATTERNS},
    {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
]


def net(kind: type[nn.Module] = nn.Linear, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [(10, 12), (9, 10)] if kind is Conv1D else [(12, 10), (10, 9)]
    return nn.Sequential(kind(*sizes[0]), nn.Tanh(), kind(*sizes[1])).to(dtype)


def x(dtype=torch.float32) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(4)).to(dtype)


def tuned(base: nn.Module, initial: Path, **options) -> PeftModel:
    """An adapter saved as it started in ``initial``, and changed since."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]} | options
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    model.save_pretrained(initial)
    randomise(model)
    return model


def convert(model: PeftModel, folder: Path, initial: Path) -> None:
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_plain_adapter_makes_the_tuned_model_of_the_original_base(options, kind, tmp_path):
    base = net(kind)
    model = tuned(base, tmp_path / "start", **options)
    convert(model, tmp_path / "plain", tmp_path / "start")
    expected = model(x())
    assert not torch.allclose(expected, base(x()), atol=1e-2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    torch.testing.assert_close(loaded(x()), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    torch.testing.assert_close(theirs(x()), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged[0].weight, model.merge_and_unload()[0].weight)


def test_a_language_model_keeps_its_logits(tmp_path):
    ids = torch.arange(9)[None]
    more = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": "pissa"}
    model = tuned(tiny_llama(), tmp_path / "start", **more).eval()
    convert(model, tmp_path / "plain", tmp_path / "start")
    expected = model(input_ids=ids).logits
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(ours(input_ids=ids).logits, expected)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(theirs(ids).logits, expected)


@pytest.mark.filterwarnings("ignore:.*should thus not be used with other adapters")
@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
@pytest.mark.peft("conversion of a base-changing start to plain LoRA of rank 2r", "same", "same")
def test_the_tensors_and_the_config_are_pefts(options, tmp_path):
    """PEFT's way: it names the start in the folder plain first, so that loading changes no base weight."""
    model = tuned(net(), tmp_path / "start", **options)
    convert(model, tmp_path / "ours", tmp_path / "start")
    more = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]} | options
    torch.manual_seed(0)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**more))
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours, expected = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


@pytest.mark.peft("that conversion with rsLoRA and rank patterns", "refused", "works")
def test_peft_refuses_rslora_with_patterns(tmp_path):
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": "pissa", "use_rslora": True}
    with pytest.warns(UserWarning, match="won't be able to pass"):
        theirs = peft.get_peft_model(net(), peft.LoraConfig(**options, **PATTERNS))
    theirs.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="is not supported when using `rank_pattern` or `alpha_pattern`"):
        theirs.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
        )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_tuned_in_peft_is_converted_here(kind, tmp_path):
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": kind}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**options))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = kind
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "tuned")
    convert(PeftModel.from_pretrained(net(), tmp_path / "tuned"), tmp_path / "plain", tmp_path / "start")
    loaded = PeftModel.from_pretrained(net(), tmp_path / "plain")
    torch.testing.assert_close(loaded(x()), theirs(x()))


def test_saving_changes_neither_the_model_nor_the_start(tmp_path):
    model = tuned(net(), tmp_path / "start", init_lora_weights="pissa")
    state, config = copy.deepcopy(model.state_dict()), model.peft_config["default"].to_dict()
    files = {path.name: path.read_bytes() for path in (tmp_path / "start").iterdir()}
    output = model(x())
    convert(model, tmp_path / "plain", tmp_path / "start")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == config
    assert torch.equal(model(x()), output)
    assert {path.name: path.read_bytes() for path in (tmp_path / "start").iterdir()} == files


def test_a_half_precision_base_is_met_to_its_rounding(tmp_path):
    base = net(dtype=torch.bfloat16)
    model = tuned(base, tmp_path / "start", init_lora_weights="pissa")
    convert(model, tmp_path / "plain", tmp_path / "start")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    for place in (0, 2):
        ours, theirs = (m.get_base_model()[place] for m in (model, loaded))
        gap = ours.weight.double() + ours.delta("default") - theirs.weight.double() - theirs.delta("default")
        assert gap.abs().max() <= 2**-8 * base[place].weight.abs().max()


def test_other_adapters_beside_it_do_not_matter(tmp_path):
    model = tuned(net(), tmp_path / "start", init_lora_weights="pissa")
    expected = model(x())
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    randomise(model.get_base_model()[0].lora_A["plain"])
    model.set_adapter("plain")  # so the original lies in the weight, not the residual
    model.save_pretrained(
        tmp_path / "converted",
        selected_adapters=["default"],
        path_initial_model_for_weight_conversion=tmp_path / "start",
    )
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "converted")(x()), expected)
    with pytest.raises(ConfigError, match=r"(?s)'plain' left these as they were:.*- 0"):
        convert(model, tmp_path / "all", tmp_path / "start")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_an_adapter_that_left_the_base_alone_is_refused(start, tmp_path):
    model = tuned(net(), tmp_path / "start", init_lora_weights=start)
    with pytest.raises(ConfigError, match=r"(?s)'default' left these as they were:.*- 0.*- 2"):
        convert(model, tmp_path / "plain", tmp_path / "start")


@pytest.mark.filterwarnings("ignore:.*should thus not be used with other adapters")
@pytest.mark.peft("that conversion of a DoRA adapter", "writes a file without the magnitudes", "refused")
def test_dora_is_refused_where_peft_writes_a_file_without_magnitudes(tmp_path):
    model = tuned(net(), tmp_path / "start", init_lora_weights="pissa", use_dora=True)
    with pytest.raises(ConfigError, match="uses DoRA, whose change of the weight has no low rank"):
        convert(model, tmp_path / "plain", tmp_path / "start")
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": "pissa", "use_dora": True}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path / "begin")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "begin")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["use_dora"]
    assert not [key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if "magn" in key]


def test_the_wrong_start_is_refused_by_layer(tmp_path):
    """PEFT subtracts whatever it is given."""
    model = tuned(net(), tmp_path / "start", init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "later")
    with pytest.raises(AdapterError, match=r"(?s)later is not the adapter 'default' as it started.*- 0.*- 2"):
        convert(model, tmp_path / "plain", tmp_path / "later")
    assert not (tmp_path / "plain").exists()


def test_the_start_of_another_rank_or_no_start_at_all_is_refused(tmp_path):
    model = tuned(net(), tmp_path / "start", init_lora_weights="pissa")
    tuned(net(), tmp_path / "other", init_lora_weights="pissa", r=3)
    with pytest.raises(
        AdapterError, match=r"size mismatch for .*the file has \(3, 12\), the model wants \(4, 12\)"
    ):
        convert(model, tmp_path / "plain", tmp_path / "other")
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        convert(model, tmp_path / "plain", tmp_path / "nowhere")


def test_a_start_whose_name_was_set_to_plain_as_peft_asks_is_the_same(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    randomise(model)
    convert(model, tmp_path / "plain", tmp_path / "start")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(net(), tmp_path / "plain")
    torch.testing.assert_close(loaded(x()), model(x()))
