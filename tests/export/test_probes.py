"""Modules that an engine passes over, found by making them loud.  The engine here is PEFT, which is made to
pass over some; llama.cpp and mlx-lm are asked in ``test_engines``."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rankfold.data.shapes.example import Example, Message
from rankfold.export.probes import Probing, loud, passed_over
from rankfold.export.told import told_by
from rankfold.models.base.load import load_tuned

ROW = Example("here:1", (Message("user", ("Hello?",)), Message("assistant", ("Hi.",))))


class Forgetful:
    """PEFT as an engine that has no place for modules whose path ends in one of ``without``."""

    name = "PEFT"

    def __init__(self, without):
        self.without, self.started = without, 0

    def run(self, folder, model, style, groups):
        for place, group in enumerate(groups):
            self.started += 1
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            tuned = peft.PeftModel.from_pretrained(base, group["adapter"]).eval()
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name and any(f"{end}.lora_B" in name for end in self.without):
                    parameter.data.zero_()
            [prompt] = group["prompts"]
            ids = torch.tensor([prompt["ids"] + prompt["answer"]])
            with torch.no_grad():
                logits = tuned(input_ids=ids).logits[0, len(prompt["ids"]) - 1 : -1]
            np.save(folder / f"{place}-0.npy", logits.numpy())


def write(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "without",
    [
        (),
        ("layers.1.self_attn.k_proj",),
        ("up_proj",),
        ("layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"),
    ],
)
def test_what_is_passed_over_is_found_by_name(adapted, without):
    base, adapter = adapted(target_modules="all-linear", rank_pattern={"v_proj": 2})
    tuned = load_tuned(adapter, merged=False)
    before = {name: parameter.clone() for name, parameter in tuned.model.named_parameters()}
    engine = Forgetful(without)
    [told] = told_by(tuned, [ROW])
    tried, found = passed_over(tuned, told, "chat", Probing(engine, base, write))
    assert tried == 14
    assert len(found) == sum(1 if "layers" in end else 2 for end in without)
    assert all(path.endswith(without) for path in found)
    for name, parameter in tuned.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_only_the_parts_that_are_named_are_loud(adapted):
    _, adapter = adapted(target_modules=["q_proj", "v_proj"])
    tuned = load_tuned(adapter, merged=False)
    layers = {
        p: m for p, m in tuned.model.get_base_model().named_modules() if p.endswith(("q_proj", "v_proj"))
    }
    path = "model.layers.1.self_attn.q_proj"
    with torch.no_grad(), loud(layers, [path]):
        for name, layer in layers.items():
            change = layer.delta("default").norm() / layer.weight.norm()
            assert float(change) == pytest.approx(3.0 if name == path else 0.0, rel=1e-3)


def test_a_module_that_is_passed_over_fails_the_certificate(adapted, tmp_path, monkeypatch):
    from rankfold.errors import ExportError
    from rankfold.export import run
    from rankfold.export.request import ExportRequest

    _, adapter = adapted()
    write_layout = run.WRITERS["hf"]

    def with_probing(*asked):
        from dataclasses import replace

        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        return replace(
            write_layout(*asked), probing=Probing(Forgetful(["layers.1.self_attn.q_proj"]), base, write)
        )

    monkeypatch.setitem(run.WRITERS, "hf", with_probing)
    with pytest.raises(ExportError, match=r"does not use the adapter's model.layers.1.self_attn.q_proj"):
        run.export_adapter(adapter, tmp_path / "out", ExportRequest.of({"to": "hf", "prompts": 1}))
    assert not (tmp_path / "out").exists()
