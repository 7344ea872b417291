"""Adapters as servers take them, held to the loaders' rules (``engine_rules``) and to PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_rules import check_lmdeploy, check_vllm, linear_names
from gguf_files import tiny_model, write_gguf
from rankfold.errors import AdapterError, ConfigError
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter

IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2))
ODD = {
    "target_modules": "all-linear",
    "rank_pattern": {"up_proj": 3},
    "alpha_pattern": {"q_proj": 5},
    "use_rslora": True,
    "lora_alpha": 7,
}


def export(adapter, out, engine, **options):
    return export_adapter(adapter, out, ExportRequest.of({"to": engine, "prompts": 2} | options))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lmdeploy"])
def test_patterns_and_scales_become_one_rank_and_one_scale_that_compute_the_same(adapted, tmp_path, engine):
    base, adapter = adapted(**ODD)
    done = export(adapter, tmp_path / "out", engine)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = linear_names(plain)
    if engine == "lmdeploy":
        check_lmdeploy(tmp_path / "out", modules)
    else:
        check_vllm(tmp_path / "out", modules, {}, max_rank=8)
    wanted = peft.PeftModel.from_pretrained(plain, adapter).eval()
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(own, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)
    assert done.certificate.engine.startswith("peft ")
    assert any("serve it: " in note and str(base) in note for note in done.notes)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "q_proj has lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is saved whole"),
        ({"target_modules": ["lm_head"]}, "lm_head holds the words"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
    ],
)
def test_what_a_server_would_refuse_or_pass_over_is_told(adapted, tmp_path, options, told):
    _, adapter = adapted(**options)
    with pytest.raises(AdapterError, match=f"(?s)--to merged is a way out.*{told}"):
        export(adapter, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_a_base_that_a_server_cannot_read_is_told(adapted, tmp_path):
    _, adapter = adapted()
    file = write_gguf(tmp_path / "base.gguf", tiny_model("llama"), "llama")
    with pytest.raises(ConfigError, match="vllm reads a model's folder"):
        export(adapter, tmp_path / "out", "vllm", model=str(file))
