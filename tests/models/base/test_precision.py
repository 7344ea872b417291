from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model, load_base
from rankfold.data.order.batching import Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError, ModelError
from rankfold.judging.losses import token_losses
from rankfold.models.base import precision
from rankfold.models.base.precision import (
    CLEARLY_FASTER,
    Precision,
    choose_precision,
    decide,
    hold_in,
    measure_speeds,
    product_speed,
)

CPU = torch.device("cpu")
NARROW = ["bfloat16", "float16"]


@pytest.mark.parametrize(
    ("speeds", "name", "reason"),
    [
        (
            {"bfloat16": 1 / 7.1},
            "float32",
            "bfloat16 products run 7.1x slower than float32 on this processor",
        ),
        ({"bfloat16": 2.3}, "bfloat16", "bfloat16 products run 2.3x faster than float32 on this processor"),
        ({"bfloat16": 1.4}, "float32", "bfloat16 products run 1.4x faster than float32 on this processor"),
        (
            {"bfloat16": 0.5, "float16": 6.0},
            "float16",
            "bfloat16 products run 2.0x slower and float16 products run 6.0x faster than float32 on this",
        ),
        ({"bfloat16": 2.0, "float16": 6.0}, "bfloat16", "bfloat16 products run 2.0x faster"),
        ({}, "float32", "this processor computes in nothing narrower"),
    ],
)
def test_the_narrow_form_is_chosen_only_where_it_is_clearly_faster(speeds, name, reason):
    chosen = decide(speeds, CPU)
    assert chosen.name == name
    assert reason in chosen.reason
    assert chosen.storage == chosen.compute == getattr(torch, name)


@given(st.dictionaries(st.sampled_from(NARROW), st.floats(0.01, 100.0)))
def test_a_choice_is_clearly_faster_or_float32(speeds):
    chosen = decide(speeds, CPU).name
    assert chosen == "float32" or speeds[chosen] >= CLEARLY_FASTER
    assert chosen != "float32" or all(speed < CLEARLY_FASTER for speed in speeds.values())


def test_the_probe_is_short_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    started = time.perf_counter()
    speeds = measure_speeds(CPU, ["bfloat16"])
    assert time.perf_counter() - started < 10  # about 0.07 s on an idle machine, and this one may be busy
    assert speeds.keys() == {"bfloat16"}
    assert speeds["bfloat16"] > 0
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the switch is oneDNN's")
def test_a_processor_without_bfloat16_units_computes_in_float32():
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from rankfold.models.base.precision import choose_precision\n"
        "cpu = torch.device('cpu')\n"
        "print(choose_precision(None, cpu))\n"
        "print(choose_precision('bfloat16', cpu))\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "name='float32'" in told[0]
    assert "x slower than float32 on this processor" in told[0]
    assert "name='bfloat16'" in told[1]
    assert "cost='bfloat16 as given, at a price: bfloat16 products run" in told[1]


def test_float32_as_given_needs_no_probe_and_no_autocast():
    chosen = choose_precision("float32", CPU)
    assert (chosen.reason, chosen.cost) == ("as given", "")
    with chosen.autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
    with Precision.of("bfloat16").autocast(CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_what_the_device_cannot_compute_in_is_refused_when_asked_for_and_passed_over_when_not(monkeypatch):
    timed = precision._seconds

    def float32_only(x, weight):
        if x.dtype != torch.float32:
            raise TypeError("BFloat16 is not supported on MPS")
        return timed(x, weight)

    monkeypatch.setattr(precision, "_seconds", float32_only)
    with pytest.raises(ConfigError, match="this processor cannot compute in bfloat16; choose float32"):
        choose_precision("bfloat16", CPU)
    assert choose_precision(None, CPU).reason == "this processor computes in nothing narrower"


@pytest.mark.parametrize("name", NARROW)
def test_weights_are_held_as_asked_and_positions_stay_exact(tiny_folder, name):
    exact = load_base(str(tiny_folder), Precision.of("float32"))
    narrow = load_base(str(tiny_folder), Precision.of(name))
    assert {p.dtype for p in narrow.model.parameters()} == {getattr(torch, name)}
    angles = narrow.model.model.rotary_emb.inv_freq
    assert torch.equal(angles, exact.model.model.rotary_emb.inv_freq)
    assert exact.notes == []
    assert narrow.notes == [f"the weights come as float32 and are rounded to {name}: 6 MB instead of 13 MB"]


def test_bfloat16_weights_that_are_held_as_float32_are_told_with_their_size(tiny_folder, tmp_path):
    small = load_base(str(tiny_folder), Precision.of("bfloat16"))
    small.model.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), Precision.of("float32"))
    assert base.notes == ["the weights come as bfloat16 and are held as float32: 13 MB instead of 6 MB"]
    for wide, narrow in zip(base.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(wide, narrow.float())
    assert load_base(str(tmp_path)).model.dtype == torch.float32


def test_a_gguf_file_is_held_as_asked(real_base):
    base = load_base(real_base.source.name, Precision.of("bfloat16"))
    assert base.model.dtype == torch.bfloat16
    assert torch.equal(base.model.model.norm.weight, real_base.model.model.norm.weight.bfloat16())
    assert any("rounded to bfloat16: 269 MB instead of 538 MB" in note for note in base.notes)


def test_a_model_that_is_cast_in_memory_keeps_its_ties_and_its_positions():
    model, exact = tiny_llama(tied=True), tiny_llama(tied=True)
    assert hold_in(model, torch.bfloat16) is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_weights_too_large_for_float16_are_refused_by_name(tiny_folder, tmp_path):
    base = load_base(str(tiny_folder))
    with torch.no_grad():
        base.model.model.norm.weight[3] = 1e5
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="too large for float16; take bfloat16(.|\n)*model.norm.weight"):
        load_base(str(tmp_path), Precision.of("float16"))


def adapted(folder, chosen: Precision) -> nn.Module:
    model = load_base(str(folder), chosen).model
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    return model


def loss_and_gradients(model: nn.Module, chosen: Precision, weight: float = 1.0):
    """The mean loss of one batch, and the gradients of the adapter by name, of ``weight`` times it."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        EncodedRow(f"row {length}", ids, ids)
        for length in (24, 17)
        for ids in [torch.randint(3, 49152, (length,), generator=generator).tolist()]
    ]
    with chosen.autocast(CPU):
        loss = token_losses(model, Padded().collate(rows, 0, CPU)).sum() / 41
    (loss * weight).backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "near"), [("bfloat16", 5e-3), ("float16", 1e-3)])
def test_narrow_storage_under_autocast_gives_nearly_the_losses_and_gradients_of_float32(
    tiny_folder, name, near
):
    exact = Precision.of("float32")
    loss, gradients = loss_and_gradients(adapted(tiny_folder, exact), exact)
    narrow = Precision.of(name)
    model = adapted(tiny_folder, narrow)
    narrow_loss, narrow_gradients = loss_and_gradients(model, narrow)
    assert narrow_loss == pytest.approx(loss, rel=near)
    assert narrow_gradients.keys() == gradients.keys() != set()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for key, gradient in narrow_gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert torch.linalg.vector_norm(gradient - gradients[key]) < 10 * near * gradients[key].norm()


def test_gradients_too_small_for_float16_survive_where_the_loss_is_scaled_up(tiny_folder):
    """What a run in float16 does before backward, undone in float32 after it."""
    exact, narrow = Precision.of("float32"), Precision.of("float16")
    tiny, scale = 1e-6, 2.0**16
    _, gradients = loss_and_gradients(adapted(tiny_folder, exact), exact, tiny)
    _, lost = loss_and_gradients(adapted(tiny_folder, narrow), narrow, tiny)
    _, kept = loss_and_gradients(adapted(tiny_folder, narrow), narrow, tiny * scale)

    def distance(ours) -> float:
        gaps = [torch.linalg.vector_norm(ours[n] - g) / g.norm() for n, g in gradients.items()]
        return float(max(gaps))

    assert distance(lost) > 0.5
    assert distance({n: g / scale for n, g in kept.items()}) < 0.02


def test_the_speed_of_products_is_measured_and_no_random_number_is_drawn():
    state = torch.get_rng_state()
    assert product_speed(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), state)
