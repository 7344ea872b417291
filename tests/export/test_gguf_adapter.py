"""An adapter alone in GGUF's file, as the gguf package reads it."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from gguf_files import permuted
from rankfold.errors import AdapterError, ConfigError
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter

PREFIX = "base_model.model.model"


def export(adapter, out, **options):
    return export_adapter(adapter, out, ExportRequest.of({"to": "gguf-adapter", "prompts": 2} | options))


def tensors(folder):
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(folder / "adapter.gguf").tensors}


def test_pairs_have_llama_cpps_names_and_order_and_the_scale_in_b(adapted, tmp_path):
    base, adapter = adapted(target_modules=["q_proj", "up_proj"], lora_alpha=12, rank_pattern={"up_proj": 2})
    done = export(adapter, tmp_path / "out")
    own, found = load_file(adapter / "adapter_model.safetensors"), tensors(tmp_path / "out")
    assert {name.split(".", 2)[2] for name in found} == {
        f"{module}.weight.lora_{side}" for module in ("attn_q", "ffn_up") for side in "ab"
    }
    q, up = (f"{PREFIX}.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj"))
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_a"], own[f"{q}.lora_A.weight"])
    heads = json.loads((base / "config.json").read_text())["num_attention_heads"]
    wanted = permuted(3 * own[f"{q}.lora_B.weight"].numpy(), heads)
    np.testing.assert_allclose(found["blk.1.attn_q.weight.lora_b"], wanted, rtol=1e-6)
    np.testing.assert_allclose(found["blk.1.ffn_up.weight.lora_b"], 6 * own[f"{up}.lora_B.weight"], rtol=1e-6)
    assert done.certificate.engine == "our own reader"
    assert any("not tried in llama.cpp" in note for note in done.notes)
    assert done.certificate.mean_kl < 1e-6


def test_an_embedding_lies_the_other_way_round_and_is_refused_where_it_is_the_head_too(adapted, tmp_path):
    _, adapter = adapted(target_modules=["embed_tokens"])
    export(adapter, tmp_path / "out")
    own, found = load_file(adapter / "adapter_model.safetensors"), tensors(tmp_path / "out")
    np.testing.assert_array_equal(
        found["token_embd.weight.lora_a"], own[f"{PREFIX}.embed_tokens.lora_embedding_A"].T
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the words are the head too"),
        ({"use_dora": True}, "q_proj: its pair has magnitudes"),
        ({"modules_to_save": ["norm"]}, "model.norm: it is saved whole"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(adapted, tmp_path, options, told):
    _, adapter = adapted(tied=True, **options)
    with pytest.raises(AdapterError, match=told):
        export(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_another_architecture_is_refused(adapted, tmp_path):
    from gguf_files import tiny_model, write_gguf

    base = write_gguf(tmp_path / "qwen2.gguf", tiny_model("qwen2"), "qwen2")
    _, adapter = adapted()
    with pytest.raises(ConfigError, match="is a qwen2, and the adapter's base a llama"):
        export(adapter, tmp_path / "out", gguf_base=base)
