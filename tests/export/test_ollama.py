"""Modelfiles; the templates were rendered by Go's text/template in ``make engines``."""

from __future__ import annotations

import copy

import pytest

from chat_formats import FORMATS
from rankfold.errors import ConfigError
from rankfold.export.ollama import Turns
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter

TURNS = [
    [("user", "Hi\n x")],
    [("system", "S"), ("user", "U")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
]
SAID = ["chatml", "qwen2.5", "qwen3", "llama3", "internlm2", "zephyr", "vicuna", "phi4", "granite"]


def with_template(tokenizer, name):
    found = copy.deepcopy(tokenizer)
    found.chat_template = FORMATS[name].path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("name", SAID)
def test_turns_are_written_as_the_template_writes_them(real_base, name):
    tokenizer = with_template(real_base.tokenizer, name)
    turns = Turns.of(tokenizer)
    for each in TURNS:
        messages = [{"role": role, "content": content} for role, content in each]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert turns.rendered(messages) == wanted


@pytest.mark.parametrize("name", ["gpt-oss", "llama3.2"])
def test_a_template_that_is_more_than_turns_is_refused(real_base, name):
    with pytest.raises(ConfigError, match="Ollama cannot say this chat template"):
        Turns.of(with_template(real_base.tokenizer, name))


def test_the_modelfile_has_the_template_the_stops_and_what_the_system_is_told(adapted, tmp_path):
    _, adapter = adapted()
    done = export_adapter(adapter, tmp_path / "out", ExportRequest.of({"to": "ollama", "prompts": 2}))
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert written.startswith('FROM ./model.gguf\nTEMPLATE """{{ range $i, $_ := .Messages }}')
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in written
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in written
    assert 'PARAMETER stop "<|im_end|>"' in written
    assert "Modelfile" in done.certificate.files
    with pytest.raises(ConfigError, match="name it with --gguf-base"):
        export_adapter(adapter, tmp_path / "alone", ExportRequest.of({"to": "ollama-adapter"}))
