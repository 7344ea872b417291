"""Runs whose adapter begins by the base's weights or by rows."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankfold import PeftModel, Recipe, fine_tune
from rankfold.errors import CheckpointError, ConfigError
from rankfold.lora.layers.registry import adapter_layers
from rankfold.models.base.load import load_base
from rankfold.train.keeping.listener import Listener
from rankfold.train.run import decide, resume

IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2))
FROM_BASE = ["pissa", "olora", "corda", "lora-ga"]


class Told(Listener):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.plan = None

    def on_stage(self, stage):
        self.stages.append(stage)

    def on_plan(self, plan):
        self.plan = plan


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    rows = write_rows(joke_rows)

    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "data": rows, "out": tmp_path / "run", "rank": 4}
        settings |= {"learning_rate": 1e-2, "samples": 0, "general": "none", "precision": "float32"}
        return Recipe.of(settings | {"max_steps": 4, "held_out": 4} | options)

    return make


@pytest.mark.parametrize("start", [*FROM_BASE, "eva"])
def test_the_tuned_model_is_the_base_as_it_is_and_the_adapter_that_was_written(recipe, tiny_folder, start):
    told = Told()
    result = fine_tune(recipe(start=start), told)
    assert result.comparison is not None
    assert result.comparison.gap < 0
    trained = told.plan.model.eval()
    for kind in (peft.PeftModel, PeftModel):
        loaded = kind.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), result.out)
        torch.testing.assert_close(loaded(IDS).logits, trained(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config["r"] == (4 if start == "eva" else 8)
    assert config["init_lora_weights"] == ("eva" if start == "eva" else True)


@pytest.mark.parametrize("start", ["lora-ga", "eva"])
def test_what_is_made_of_rows_is_made_once(recipe, start, tmp_path):
    first, second, third = Told(), Told(), Told()
    decide(recipe(start=start), first)
    again = decide(recipe(start=start), second)
    assert any("rows" in stage for stage in first.stages)
    assert not any("of" in stage and "rows" in stage and "taken" not in stage for stage in second.stages)
    assert any("taken from" in stage for stage in second.stages)
    decide(recipe(start=start, rank=3), third)
    assert any("rows" in stage for stage in third.stages)
    shutil.rmtree(tmp_path / "cache")
    afresh = decide(recipe(start=start), Told())
    for one, other in zip(again.model.parameters(), afresh.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_layer_that_eva_gave_no_rank_has_none_when_the_start_is_taken_again(recipe, tmp_path):
    decide(recipe(start="eva"), Told())
    [file] = (tmp_path / "cache" / "starts").glob("*/adapter_model.safetensors")
    kept = {key: tensor for key, tensor in load_file(file).items() if ".layers.0.self_attn.q_proj" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    model = decide(recipe(start="eva"), Told()).model.get_base_model()
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert hasattr(model.model.layers[1].self_attn.q_proj, "lora_A")


def test_a_kept_start_that_is_damaged_is_made_again(recipe, tmp_path):
    decide(recipe(start="lora-ga"), Told())
    [file] = (tmp_path / "cache" / "starts").glob("*/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    told = Told()
    decide(recipe(start="lora-ga"), told)
    assert any("is damaged" in stage for stage in told.stages)
    assert len(load_file(file)) > 0
    result = fine_tune(recipe(start="lora-ga"))
    (result.out / "start" / file.name).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="the start of the run, is damaged"):
        decide(recipe(start="lora-ga"), Told())


@pytest.mark.parametrize("start", ["corda", "pissa"])
def test_a_run_goes_on_to_the_same_bits(recipe, start, tmp_path):
    whole = fine_tune(recipe(start=start, out=tmp_path / "whole"))

    class Stopping(Told):
        def on_step(self, record):
            self.stopped = record.step >= 2

        def wants_stop(self):
            return getattr(self, "stopped", False)

    cut = fine_tune(recipe(start=start, out=tmp_path / "cut", save_every_steps=1), Stopping())
    assert cut.interrupted
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    resume(tmp_path / "cut")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert whole.comparison is not None
    assert files[0] == files[1]


def test_the_factors_of_corda_are_of_one_size_and_their_product_is_the_papers(recipe, tiny_folder):
    plan = decide(recipe(start="corda"), Told())
    whole = dict(load_base(str(tiny_folder)).model.float().named_modules())
    for path, layer in adapter_layers(plan.model):
        lora_a, lora_b = layer.factors("default")
        torch.testing.assert_close(lora_a.norm(dim=1), lora_b.norm(dim=0))
        update = layer.scaling["default"] * lora_b @ lora_a
        base = whole[path.removeprefix("base_model.model.")].weight
        torch.testing.assert_close(layer.weight + update, base, rtol=1e-4, atol=1e-5)
        assert update.norm() > 0.1 * base.norm()


def test_loftq_begins_by_what_the_rounding_took(recipe, tiny_folder):
    told = Told()
    plan = decide(recipe(start="loftq", stored="nf4", rank=8), told)
    whole = load_base(str(tiny_folder)).model.float().eval()
    with torch.no_grad():
        wanted = whole(IDS).logits
        started = (plan.model.eval()(input_ids=IDS).logits - wanted).norm()
        with plan.model.disable_adapter():
            rounded = (plan.model(input_ids=IDS).logits - wanted).norm()
    assert started < 0.8 * rounded
    assert any("error made up for" in stage for stage in told.stages)
    result = fine_tune(recipe(start="loftq", stored="nf4", rank=8))
    held = load_base(str(tiny_folder), stored="nf4").model
    loaded = PeftModel.from_pretrained(held, result.out).eval()
    assert torch.isfinite(loaded(input_ids=IDS).logits).all()


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_dora_and_rslora_are_settings(recipe, tiny_folder, option):
    told = Told()
    result = fine_tune(recipe(**{option: True}), told)
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config[option] is True
    assert result.comparison.gap < 0
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    loaded = peft.PeftModel.from_pretrained(base, result.out)
    wanted = told.plan.model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=1e-3, atol=1e-4)


WRONG = {
    "a stored base": ({"start": "pissa", "stored": "int8"}, "holds no rest of it"),
    "nothing was rounded": ({"start": "loftq"}, "say stored"),
    "an original of nothing": ({"start": "eva", "original": "x"}, "original is for start=loftq"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_said_before_anything_is_read(recipe, case):
    options, told = WRONG[case]
    with pytest.raises(ConfigError, match=told):
        decide(recipe(**options), Told())
