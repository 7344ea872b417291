"""Whole models with rows apart against the same rows alone, by transformers' own attention."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import tiny_llama
from rankfold.data.order.batching import Packed
from rankfold.data.tokens.encode import EncodedRow
from rankfold.models.running import rows_apart
from rankfold.models.running.rows_apart import NAME, attend_rows_apart
from tiny_models import tiny

LENGTHS = (7, 12, 1, 3, 12)


def rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [EncodedRow(str(place), row, row) for place, row in enumerate(ids)]


def packed_logits(model) -> torch.Tensor:
    return model(**Packed().collate(rows(), 0, "cpu").inputs, use_cache=False).logits[0]


def gradients(model, logits) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    (logits * torch.randn(logits.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "architecture",
    ["Llama", "Gemma3Text", "Granite", "Cohere2", "GPT2", "Qwen3", "Mistral", "Llama4Text"],
)
def test_logits_and_gradients_are_those_of_rows_alone(architecture):
    """Windows and chunks of four tokens are kept within each row."""
    plain, apart = tiny(architecture), tiny(architecture)
    assert attend_rows_apart(apart) == ""
    alone = torch.cat([plain(torch.tensor([row.input_ids]), use_cache=False).logits[0] for row in rows()])
    together = packed_logits(apart)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    wanted, found = gradients(plain, alone), gradients(apart, together)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max().clamp_min(1e-3), name


def test_the_rows_are_found_once_a_forward_and_no_masked_product_is_made(monkeypatch):
    model, calls, masks = tiny_llama(), [], []
    attend_rows_apart(model)
    found, attention = rows_apart.rows_of, torch.nn.functional.scaled_dot_product_attention

    def rows_of(mask):
        calls.append(mask.shape)
        return found(mask)

    def attend(query, key, value, attn_mask=None, **options):
        masks.append((query.shape[2], attn_mask))
        return attention(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(rows_apart, "rows_of", rows_of)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    packed_logits(model)
    assert calls == [(35, 35)]
    assert masks == [(length, None) for _ in range(2) for length in LENGTHS]
    assert not rows_apart._rows, "nothing is kept of a mask that is gone"


def test_padded_batches_and_generation_are_what_they_were():
    plain, apart = tiny_llama(), tiny_llama()
    attend_rows_apart(apart)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    for mask in ([[1] * 9, [1] * 5 + [0] * 4], [[1] * 9, [0] * 4 + [1] * 5]):
        batch = {"input_ids": ids, "attention_mask": torch.tensor(mask)}
        assert torch.equal(apart(**batch).logits, plain(**batch).logits)
        one = {name: values[1:] for name, values in batch.items()}
        assert torch.equal(apart(**one).logits, plain(**one).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(apart.generate(**batch, **options), plain.generate(**batch, **options))


@pytest.mark.parametrize("architecture", ["Gemma2", "Llama"])
def test_attention_that_torchs_kernel_does_not_compute_is_left_alone(architecture):
    """Soft-capped, which is computed step by step by itself; and where the user asks for that."""
    model = tiny(architecture)
    if architecture == "Llama":
        model.set_attn_implementation("eager")
    assert "eager, which has no form for rows apart" in attend_rows_apart(model)
    assert model.config._attn_implementation == "eager"


def test_on_another_device_transformers_chooses():
    model = tiny_llama().to("meta")
    assert "on meta the attention is the one that transformers chooses" in attend_rows_apart(model)
    assert model.config._attn_implementation == "sdpa"


def test_asking_twice_changes_nothing_and_no_file_tells_of_it(tmp_path):
    model = tiny_llama()
    assert attend_rows_apart(model) == attend_rows_apart(model) == ""
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_gradient_checkpointing_sees_the_same_rows():
    plain, saving = tiny_llama().train(), tiny_llama().train()
    for model in (plain, saving):
        attend_rows_apart(model)
    saving.activation_checkpointing_enable()
    wanted, found = (gradients(model, packed_logits(model)) for model in (plain, saving))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_one_row_that_fills_a_block_takes_the_same_way(monkeypatch):
    plain, apart = (tiny_llama().bfloat16() for _ in range(2))
    attend_rows_apart(apart)
    taken, real = [], rows_apart.attention_of_rows
    monkeypatch.setattr(rows_apart, "attention_of_rows", lambda *a: taken.append(a[3].lengths) or real(*a))
    ids = torch.randint(3, 60, (1, 21), generator=torch.Generator().manual_seed(0))
    found = apart(input_ids=ids, use_cache=False).logits
    assert taken == [[21]] * 2
    torch.testing.assert_close(found, plain(input_ids=ids, use_cache=False).logits, rtol=0.05, atol=0.05)
