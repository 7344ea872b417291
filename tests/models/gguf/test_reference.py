"""What llama.cpp computes, kept by ``make engines``, against what rankfold makes of the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))

import reference

from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tokenizer import end_ids, gguf_tokenizer

# llama.cpp rounds what meets a quantised weight to 8 bits; the weights themselves are the same.
MOST = {"BF16": 2e-3, "Q8_0": 2e-2, "Q4_0": 2e-2, "Q4_1": 2e-2, "Q5_0": 2e-2, "Q5_1": 2e-2}
MOST |= {"Q4_K": 2e-2, "Q5_K": 1e-2, "Q6_K": 1e-2}
IN_EVERY_RUN = ("smollm", "deepseek-llm", "tekken", "pieces", "pieces-without-space", "tiny")
LOGITS = np.load(reference.LOGITS)
ANSWERS = json.loads(reference.ANSWERS.read_text(encoding="utf-8"))


def of_every_run(name: str) -> bool:
    return name not in reference.KIND_FILES or name.startswith("llama") or name.endswith("Q4_K.gguf")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if of_every_run(name) else pytest.mark.slow)
        for name in reference.MODEL_FILES
    ],
)
def test_logits_are_those_of_llama_cpp(name, tmp_path):
    ours = reference.our_logits(reference.write_model(tmp_path, name))[reference.kept(name)]
    most = MOST.get(name.removesuffix(".gguf").rpartition("-")[2], 1e-4)
    assert reference.divergence(LOGITS[name], ours) < most


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=()
            if name.removesuffix(".vocab.gguf") in (*IN_EVERY_RUN, *reference.TEMPLATES)
            else pytest.mark.slow,
        )
        for name in reference.VOCABULARIES
    ],
)
def test_tokens_ends_and_templates_are_those_of_llama_cpp(name, tmp_path):
    path, theirs = reference.write_words(tmp_path, name), ANSWERS[name]
    pairs = zip(reference.checksums(reference.our_tokens(path)), theirs["tokens"], strict=True)
    assert sum(ours != wanted for ours, wanted in pairs) <= reference.KNOWN_DIFFERENCES.get(name, 0)
    assert gguf_tokenizer(read_gguf(path))("Hello")["input_ids"] == theirs["with_bos"]
    assert end_ids(read_gguf(path)) == theirs["ends"]
    if theirs["rendered"]:
        assert reference.our_renderings(path) == theirs["rendered"]


def test_every_file_of_the_reference_is_tested():
    assert {*LOGITS.files} == {*reference.MODEL_FILES}
    assert {*ANSWERS} == {*reference.VOCABULARIES}
