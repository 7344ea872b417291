"""The memory that is forecast, held against runs that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from conftest import rankfold_command, tiny_llama
from rankfold.data.order.batching import Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.lora import LoraConfig
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.meta_model import load_outline
from rankfold.models.base.precision import Precision
from rankfold.models.running.gates import fuse_gates
from rankfold.models.running.norms import fuse_norms
from rankfold.peft_surface import get_peft_model
from rankfold.train.planning.activations import Shape, kept_by_forward
from rankfold.train.planning.footprint import BEST_BYTES, FORMS_TO_PLAN, weights_of
from rankfold.train.planning.forecast import ForecastRequest, forecast
from rankfold.train.planning.peak import Peak, Tower, step_memory
from rankfold.train.planning.trial import Trial

ROOT = Path(__file__).parents[3]
FORMS = {form.name: form for form in FORMS_TO_PLAN}
PROGRAM = 500_000_000
WITHIN = 1.15
JOKES = ROOT / "src" / "rankfold" / "data" / "cold_jokes" / "train.jsonl"
# Peaks of `rankfold train --max-steps 2 --samples 0` on these jokes and SmolLM2, on 2 cores: the form, what
# it is computed in, whether activations are recomputed, and the bytes.
MEASURED = [
    ("float32", "float32", False, 2_406_793_216),
    ("bfloat16", "bfloat16", False, 1_555_623_936),
    ("q4_0", "float32", False, 2_034_958_336),
    ("int8", "float32", False, 1_988_001_792),
    ("float32", "float32", True, 1_322_565_632),
    ("int8", "bfloat16", False, 1_473_880_064),
]


def peak_of(base, tokens: int, dtype: torch.dtype) -> Peak:
    weights = weights_of(base)
    with torch.device("meta"):
        model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    fuse_gates(model)
    fuse_norms(model)
    return Peak(
        weights=weights,
        step=step_memory(model),
        tokens=tokens,
        kept=kept_by_forward(model, Shape(1, tokens), [dtype]),
        tower=Tower(numbers=0, pixels=0),
        program_bytes=PROGRAM,
    )


@pytest.mark.parametrize(("form", "computed", "recomputed", "measured"), MEASURED)
def test_the_peak_of_measured_runs_is_within_the_margin(form, computed, recomputed, measured):
    dtype = getattr(torch, computed)
    peak = peak_of(load_outline(DEFAULT_MODEL).model, 1024, dtype)
    told = peak.of(FORMS[form], dtype, recomputed=recomputed)
    assert measured / WITHIN < told < measured * WITHIN


def test_the_peak_of_a_large_base_is_within_the_margin(tmp_path):
    """benchmarks/large_base.py: one step of 256 tokens on 8.0 B weights in Q4_0 blocks, without the copy of
    the best weights that a run has."""
    figure = {f["name"]: f for f in json.loads((ROOT / "benchmarks" / "results.json").read_text())}
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    peak = peak_of(load_outline(str(tmp_path)).model, 256, torch.float32)
    told = peak.of(FORMS["q4_0"], torch.float32, recomputed=True) - peak.step.trained * BEST_BYTES
    measured = figure["large_base_memory"]["ours"] * 1e9
    assert measured / WITHIN < told < measured * WITHIN


@pytest.mark.parametrize("length", [16, 64])
def test_what_a_forward_keeps_is_what_a_real_one_does(tmp_path, length):
    """Counted without numbers as by ``Trial``, but for the hidden states that reach the head."""
    config = LoraConfig(r=4, target_modules="all-linear")
    rows = [EncodedRow("rows.jsonl:1", [5] * length, [5] * length)]
    real = get_peft_model(tiny_llama(), config)
    counted = Trial(real, rows, 0, Precision.of("float32")).kept_bytes_per_token(Padded()) * length
    tiny_llama().config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = get_peft_model(load_outline(str(tmp_path)).model, config)
    kept = kept_by_forward(model, Shape(1, length), [torch.float32])[torch.float32]
    assert not kept.guess
    assert kept.all == pytest.approx(counted, rel=0.05)
    assert kept.recomputed < kept.all


def test_a_model_that_asks_for_numbers_is_guessed_and_that_is_said(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = get_peft_model(load_outline(str(tmp_path)).model, LoraConfig(target_modules="all-linear"))
    decoder = model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["input_ids"].max().item(), with_kwargs=True
    )
    kept = kept_by_forward(model, Shape(2, 16), [torch.float32])[torch.float32]
    assert "item" in kept.guess
    assert kept.all == 2 * 18 * 2 * 16 * 32 * 4


@pytest.mark.slow
def test_a_run_s_own_peak_is_within_the_margin(tmp_path):
    options = ["--data", JOKES, "--precision", "float32"]
    run = rankfold_command("train", *options, "--out", tmp_path / "run", "--max-steps", "2", "--samples", "0")
    assert run.returncode == 0, run.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    told = forecast(ForecastRequest.of({"data": JOKES, "precision": "float32"}))
    peak = told.forms[0].peak_bytes
    assert last["memory_bytes"] / WITHIN < peak < last["memory_bytes"] * WITHIN
