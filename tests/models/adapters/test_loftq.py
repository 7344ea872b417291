"""LoftQ on bases whose weights are held in few bits."""

from __future__ import annotations

import pytest
import torch

from gguf_files import tiny_model, write_gguf
from rankfold import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from rankfold.errors import ConfigError, ModelError
from rankfold.models.base.find import BaseSource
from rankfold.models.base.packed import held_model

IDS = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(1))
CONFIG = {"r": 16, "lora_alpha": 48, "target_modules": "all-linear"}


def adapted(folder, stored: str) -> tuple[torch.nn.Module, PeftModel]:
    """A model, and an adapter on it with its weights held as ``stored``."""
    model = tiny_model("llama")
    model.save_pretrained(folder / "whole")
    source = BaseSource("whole", folder / "whole", "whole")
    if stored == "gguf":
        write_gguf(folder / "a.gguf", tiny_model("llama"), "llama", kind="Q4_0")
        source = BaseSource("a.gguf", folder / "a.gguf", "a.gguf")
    held = held_model(model.config, source, stored)
    return model.eval(), get_peft_model(held, LoraConfig(**CONFIG)).eval()


@pytest.mark.parametrize("stored", ["q4_0", "int8", "nf4", "gguf"])
def test_the_rounded_base_and_the_factors_are_nearer_the_base(stored, tmp_path):
    whole, model = adapted(tmp_path, stored)
    with torch.no_grad():
        wanted = whole(input_ids=IDS).logits
        before = (model(input_ids=IDS).logits - wanted).norm()
        left = replace_lora_weights_loftq(model, tmp_path / "whole")
        after = (model(input_ids=IDS).logits - wanted).norm()
    assert after < 0.9 * before  # int8 rounds embeddings and head too, which have no adapter
    assert len(left) == 4 * 7
    for path, share in left.items():
        layer, original = model.base_model.model.get_submodule(path), whole.get_submodule(path).weight
        difference = (original - layer.base_weight()).detach().double()
        values = torch.linalg.svdvals(difference)
        assert share == pytest.approx(float(values[16:].norm() / values.norm()), rel=1e-3)
        update = layer.get_delta_weight("default")
        rest = torch.linalg.matrix_norm(original - layer.base_weight() - update)
        assert float(rest.detach()) == pytest.approx(share * float(values.norm()), rel=1e-3)


def test_a_change_can_be_taken_back(tmp_path):
    _, model = adapted(tmp_path, "q4_0")
    kept = []

    def keep(changed: PeftModel, path: str) -> bool:
        assert changed is model
        kept.append(path)
        return "q_proj" in path

    left = replace_lora_weights_loftq(model, str(tmp_path / "whole" / "model.safetensors"), callback=keep)
    assert len(kept) == 4 * 7
    assert {path.rpartition(".")[2] for path in left} == {"q_proj"}
    layer = model.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.lora_B["default"].weight.any()
    assert not layer.k_proj.lora_B["default"].weight.any()


def test_what_there_is_nothing_to_make_up_for_is_told(tmp_path):
    plain = get_peft_model(tiny_model("llama"), LoraConfig(**CONFIG))
    with pytest.raises(ConfigError, match="nor another with a weight in few bits"):
        replace_lora_weights_loftq(plain)
    _, model = adapted(tmp_path, "q4_0")
    with pytest.raises(ModelError, match="nowhere"):
        replace_lora_weights_loftq(model, tmp_path / "nowhere")
