"""Exports in the programs that they are for.  These need environments of their own, which ``make engines``
makes: RANKFOLD_LLAMA_PYTHON and RANKFOLD_MLX_PYTHON name their interpreters, RANKFOLD_GO the go command."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from chat_formats import FORMATS
from gguf_files import MODELS, tiny_model, vocabulary, write_vocabulary
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError, ExportError
from rankfold.export.ollama import Turns
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter
from rankfold.models.base.load import load_base
from rankfold.models.gguf import adapter as gguf_adapter
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tokenizer import gguf_tokenizer

LLAMA, MLX, GO = (os.environ.get(f"RANKFOLD_{name}") or None for name in ("LLAMA_PYTHON", "MLX_PYTHON", "GO"))
needs_llama = pytest.mark.skipif(LLAMA is None, reason="no llama.cpp here: make engines")
needs_mlx = pytest.mark.skipif(MLX is None, reason="no mlx-lm here: make engines")
needs_go = pytest.mark.skipif(GO is None, reason="no Go here")


def on_family(tmp_path, name, **options):
    """A base's folder with one of MODELS, and an adapter on it; the folder's name is no model's."""
    folder = tmp_path / "base"
    model = tiny_model(name, vocab_size=336)
    model.config.eos_token_id = model.generation_config.eos_token_id = 257
    model.save_pretrained(folder)
    tokenizer = gguf_tokenizer(read_gguf(write_vocabulary(tmp_path / "v.gguf", vocabulary())))
    tokenizer.chat_template = FORMATS["chatml"].path.read_text()
    tokenizer.save_pretrained(folder)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | options)
    tuned = get_peft_model(load_base(str(folder)).model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def plain_base(adapter, out):
    """The base alone as a GGUF file: with an adapter of zeros."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    own = load_file(file)
    save_file({key: tensor if "_A" in key else 0 * tensor for key, tensor in own.items()}, file)
    export_adapter(
        adapter, out, ExportRequest.of({"to": "gguf", "type": "F32", "prompts": 0, "allow": ["hash"]})
    )
    save_file(own, file)
    return out / "model.gguf"


@needs_llama
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_tuned_model_of_every_architecture(tmp_path, name):
    adapter = on_family(tmp_path, name)
    asked = {"prompts": 2, "engine_python": LLAMA, "allow": ["hash"]}
    done = export_adapter(adapter, tmp_path / "gguf", ExportRequest.of(asked | {"to": "gguf", "type": "F32"}))
    assert done.certificate.engine.startswith("llama.cpp")
    assert done.certificate.mean_kl < 5e-5
    base = plain_base(adapter, tmp_path / "plain")
    alone = ExportRequest.of(asked | {"to": "gguf-adapter", "gguf_base": base})
    done = export_adapter(adapter, tmp_path / "alone", alone)
    assert done.certificate.mean_kl < 5e-5
    assert done.certificate.modules_tried in (16, 28, 35, 49)
    assert done.certificate.passed_over == []


@needs_llama
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_llama_cpp_takes_pairs_of_words_and_head(tmp_path):
    adapter = on_family(tmp_path, "llama", target_modules=["embed_tokens", "lm_head", "q_proj"])
    base = plain_base(adapter, tmp_path / "plain")
    asked = {"to": "gguf-adapter", "gguf_base": base, "prompts": 2, "engine_python": LLAMA, "allow": ["hash"]}
    done = export_adapter(adapter, tmp_path / "out", ExportRequest.of(asked))
    assert done.certificate.modules_tried == 6


@needs_llama
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pair_that_is_left_out_is_found_by_llama_cpp(tmp_path, monkeypatch):
    adapter = on_family(tmp_path, "qwen2")
    base = plain_base(adapter, tmp_path / "plain")
    placed = gguf_adapter._placed
    lost = "blk.2.ffn_up.weight"
    monkeypatch.setattr(
        gguf_adapter, "_placed", lambda *asked: [each for each in placed(*asked) if each[1] != lost]
    )
    asked = {"to": "gguf-adapter", "gguf_base": base, "prompts": 2, "engine_python": LLAMA, "allow": ["hash"]}
    with pytest.raises(ExportError, match="does not use the adapter's model.layers.2.mlp.up_proj"):
        export_adapter(adapter, tmp_path / "out", ExportRequest.of(asked))


@needs_mlx
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_mlx_lm_computes_the_tuned_model(tmp_path, name):
    adapter = on_family(tmp_path, name)
    asked = ExportRequest.of({"to": "mlx", "prompts": 2, "engine_python": MLX})
    config = tmp_path / "base" / "config.json"
    words = json.loads(config.read_text())
    config.write_text(json.dumps(words | {"rope_theta": words["rope_parameters"]["rope_theta"]}))
    done = export_adapter(adapter, tmp_path / "out", asked)
    assert done.certificate.engine.startswith("mlx-lm")
    assert done.certificate.modules_tried == 28


@needs_mlx
def test_mlx_lm_that_takes_another_base_of_positions_in_silence_is_found_out(tmp_path, monkeypatch):
    """A config that transformers 5 writes has no rope_theta, and mlx-lm takes 10,000 then."""
    adapter = on_family(tmp_path, "llama-base")
    monkeypatch.setattr("rankfold.export.layouts._refuse_silent_positions", lambda _: None)
    with pytest.raises(ExportError, match="nats a token from the tuned model's"):
        export_adapter(
            adapter, tmp_path / "out", ExportRequest.of({"to": "mlx", "prompts": 2, "engine_python": MLX})
        )


@needs_go
@pytest.mark.parametrize("name", FORMATS)
def test_go_writes_the_turns_as_the_template_does(tmp_path, real_base, name):
    import copy

    tokenizer = copy.deepcopy(real_base.tokenizer)
    if not FORMATS[name].path.is_file():
        pytest.skip("written by no file")
    tokenizer.chat_template = FORMATS[name].path.read_text(encoding="utf-8")
    try:
        turns = Turns.of(tokenizer)
    except ConfigError:
        return
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    (tmp_path / "template").write_text(turns.in_go())
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        messages = [{"role": role, "content": f"the {role}\nsays"} for role in roles]
        usual = [{"role": "system", "content": turns.usual}] if turns.usual and roles[0] != "system" else []
        told = json.dumps(usual + messages)
        run = [GO, "run", "main.go", "template", told]
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout == turns.rendered(messages)


GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	var messages []Message
	json.Unmarshal([]byte(os.Args[2]), &messages)
	made := template.Must(template.New("").Parse(string(text)))
	if err := made.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil {
		panic(err)
	}
}
"""
