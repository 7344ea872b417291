"""The merged model in one GGUF file, beside PEFT on the base, as transformers reads such a file."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rankfold
from gguf_files import WIDE, tiny_model, write_gguf
from rankfold.data.shapes.example import Example, Message
from rankfold.errors import ConfigError, MergeError, ModelError, OutputError
from rankfold.export import gguf_model
from rankfold.export.certificate import Certificate, compare
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter
from rankfold.export.told import told_by
from rankfold.models.base.load import load_base, load_tuned
from rankfold.models.gguf.file import read_gguf

IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2))


def export(adapter, out, **options):
    return export_adapter(adapter, out, ExportRequest.of({"to": "gguf", "prompts": 2} | options))


def on_gguf(tmp_path, kind="Q4_1", **options):
    """A GGUF base and an adapter on it."""
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    keys = {"tokenizer.chat_template": template}
    model = tiny_model("llama-tied", **WIDE)
    base = write_gguf(tmp_path / "base.gguf", model, "llama", kind=kind, keys=keys)
    config = rankfold.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | options)
    tuned = rankfold.get_peft_model(load_base(str(base)).model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_the_file_computes_what_peft_does_with_the_adapter(adapted, tmp_path, target):
    base, adapter = adapted(
        tied=target != "lm_head", target_modules=["q_proj", "k_proj", "down_proj", target]
    )
    done = export(adapter, tmp_path / "out", type="F32")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, adapter).eval()
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)
    assert done.certificate.engine == "our own reader"
    assert done.certificate.tokens_equal == done.certificate.prompts == 2
    assert done.certificate.mean_kl < 1e-6


def test_what_the_adapter_does_not_touch_is_copied_bit_by_bit(tmp_path):
    base, adapter = on_gguf(tmp_path)
    done = export(adapter, tmp_path / "out")
    before, after = read_gguf(base), read_gguf(tmp_path / "out" / "model.gguf")
    assert dict(before.keys) == {key: after.keys[key] for key in before.keys}
    assert [*before.tensors] == [*after.tensors]
    other = [name for name in before.tensors if before.data(name).tobytes() != after.data(name).tobytes()]
    assert other == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    assert done.certificate.dtype == "Q4_1"
    assert done.certificate.update_lost > 0
    assert done.certificate.worst_layer.endswith("q_proj.weight")


def test_blocks_that_cannot_be_made_here_become_wider_ones_where_the_adapter_changes_them(tmp_path):
    base, adapter = on_gguf(tmp_path, kind="Q6_K")
    done = export(adapter, tmp_path / "out", prompts=0)
    after = read_gguf(tmp_path / "out" / "model.gguf").tensors
    assert after["blk.0.attn_q.weight"].kind == "Q8_0"
    assert after["blk.0.attn_k.weight"].kind == read_gguf(base).tensors["blk.0.attn_k.weight"].kind == "Q6_K"
    assert any("written anew: Q6_K as Q8_0" in note for note in done.notes)


@pytest.mark.parametrize(
    ("kind", "words"), [("Q4_0", "Q8_0"), ("Q8_0", "Q8_0"), ("F16", "F16"), ("BF16", "BF16")]
)
def test_all_matrices_are_in_the_type_that_is_asked_for_and_words_in_eight_bits_at_least(
    tmp_path, kind, words
):
    _, adapter = on_gguf(tmp_path)
    export(adapter, tmp_path / "out", type=kind, prompts=0)
    file = read_gguf(tmp_path / "out" / "model.gguf")
    assert file.keys["general.file_type"] == gguf_model.FILE_TYPES[kind]
    kinds = {name: tensor.kind for name, tensor in file.tensors.items()}
    assert kinds.pop("token_embd.weight") == words
    assert {own for name, own in kinds.items() if "norm" not in name} == {kind}
    assert {own for name, own in kinds.items() if "norm" in name} == {"F32"}


def test_what_was_learnt_of_the_rows_and_is_lost_in_the_blocks_is_a_problem(tmp_path):
    _, adapter = on_gguf(tmp_path)
    export(adapter, tmp_path / "out", type="Q8_0", prompts=0)
    row = Example("here:1", (Message("user", ("Hello?",)), Message("assistant", ("It is seen.",))))
    told = told_by(load_tuned(adapter, merged=False), [row])
    judge = gguf_model.gguf_judge(tmp_path / "out" / "model.gguf", ExportRequest(to="gguf"), "chat")
    lost = [replace(each, own_loss=each.base_loss - len(each.own)) for each in told]  # a nat a token
    for answers, problems in ((told, []), (lost, ["the update does not survive Q8_0"])):
        made = compare(Certificate("gguf", judge.name, "Q8_0", 1.0), answers, judge.says(answers))
        assert [problem.partition(": ")[2] for problem in made.problems] == problems
    assert made.learnt == pytest.approx(1)
    assert made.kept < 0.7


def test_another_template_and_another_stop_go_into_the_file(adapted, tmp_path, real_base):
    _, adapter = adapted()
    export(adapter, tmp_path / "out", prompts=0)
    keys = read_gguf(tmp_path / "out" / "model.gguf").keys
    assert keys["tokenizer.chat_template"] == real_base.tokenizer.chat_template
    assert keys["tokenizer.ggml.pre"] == "smollm"
    assert keys["general.architecture"] == "llama"


def test_what_gguf_has_no_words_for_is_refused_by_name(adapted, tmp_path):
    base, adapter = adapted()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ModelError, match="hidden_act is 'relu', and in the file 'silu'"):
        export(adapter, tmp_path / "out", prompts=0)
    (base / "config.json").write_text(json.dumps(config | {"model_type": "stablelm"}))
    with pytest.raises(ModelError, match="a stablelm is not written as GGUF here"):
        export(adapter, tmp_path / "out", prompts=0, allow=["missing", "unexpected", "shape", "base"])
    assert not (tmp_path / "out").exists()


def test_options_of_other_formats_are_refused_together():
    with pytest.raises(ConfigError, match=r"dtype is for merged.*; common_rank is for internvl"):
        ExportRequest.of({"to": "gguf", "dtype": "float16", "common_rank": 4})


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    _, adapter = on_gguf(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left"):
        export(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.gguf"]


def test_an_engine_that_is_not_there_is_told(tmp_path):
    _, adapter = on_gguf(tmp_path)
    with pytest.raises(ConfigError, match="no such file; name the interpreter"):
        export(adapter, tmp_path / "out", engine_python=tmp_path / "python")
    assert not (tmp_path / "out").exists()


def test_numbers_that_a_type_has_no_room_for_are_told_by_name(adapted, tmp_path):
    base, adapter = adapted()
    file = base / "model.safetensors"
    own = load_file(file)
    own["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(own, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"blk.1.ffn_up.weight has numbers up to 1e\+06, too large for F16"):
        export(adapter, tmp_path / "out", type="F16", allow=["base"], prompts=0)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
            "no words here for beta_fast of rope_type 'yarn'",
        ),
        ({"rope_type": "dynamic", "factor": 4.0}, "rope_type is 'dynamic'"),
    ],
)
def test_positions_that_a_file_cannot_say_are_refused(adapted, tmp_path, more, told):
    base, adapter = adapted()
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] |= more
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=told):
        export(adapter, tmp_path / "out", prompts=0)


def test_a_window_that_llama_cpp_does_not_read_is_told(adapted, tmp_path):
    base, adapter = adapted()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 64}))
    done = export(adapter, tmp_path / "out", prompts=0)
    assert any("does not read sliding_window = 64" in note for note in done.notes)
