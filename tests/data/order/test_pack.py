"""Packed rows against the same rows one by one."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batches import MICRO_BATCH_TOKENS
from rankfold.data.order.batching import Packed, Padded, blocks
from rankfold.data.order.pack import choose_batching, operations, why_not_packed
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import ConfigError
from rankfold.judging.losses import token_losses
from rankfold.models.running.rows_apart import NAME, attend_rows_apart

WAYS = {"packed": Packed(), "padded": Padded()}


def make_rows(*lengths: int, vocabulary: int = 49152) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        prompt = place % 3 * length // 4  # some rows are trained from their first token on
        rows.append(EncodedRow(f"f:{place}", ids, [IGNORE] * prompt + ids[prompt:]))
    return rows


def gradients(model: nn.Module, rows: list[EncodedRow], kind: str) -> dict[str, torch.Tensor]:
    batching = WAYS[kind]
    for group in batching.cut(rows):
        token_losses(model, batching.collate(group, 0, "cpu")).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: nn.Module, rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    """Without any of our own code: transformers' logits of each row alone, and cross-entropy."""
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORE, reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 2e-5
) -> None:
    """Equal to ``tolerance`` of the largest gradient of each tensor: rounding of float32 unless told."""
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rows apart"])
@pytest.mark.parametrize("kind", WAYS)
def test_gradients_are_those_of_rows_one_by_one(kind, attention):
    rows = make_rows(9, 12, 2, 17, 12, 5)
    models = [tiny_llama(), tiny_llama()]
    if attention == "rows apart":
        assert attend_rows_apart(models[0]) == ""
    else:
        for model in models:
            model.set_attn_implementation(attention)
    assert_same(gradients(models[0], rows, kind), one_by_one(models[1], rows))


def test_gradients_of_the_real_model_are_the_same_packed_padded_and_one_by_one(fresh_base):
    """Thirty layers multiply the rounding errors of two."""
    attend_rows_apart(fresh_base.model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(fresh_base.model, config)
    randomise(model)
    rows, found = make_rows(9, 14, 6), []
    for way in (*WAYS, None):
        gradient = gradients(model, rows, way) if way else one_by_one(model, rows)
        found.append({name: values.clone() for name, values in gradient.items()})
        model.zero_grad()
    assert_same(found[0], found[2], 2e-4)
    assert_same(found[1], found[2], 2e-4)


def test_a_row_sees_nothing_of_its_neighbours_and_its_first_token_is_not_trained():
    model, rows = tiny_llama(), make_rows(6, 8, 5)
    other = [make_rows(11, 3, vocabulary=100)[0], rows[1], rows[2]]
    seen = [
        model(**Packed().collate(group, 0, "cpu").inputs, use_cache=False).logits[0, -13:]
        for group in (rows, other)
    ]
    torch.testing.assert_close(*seen)
    batch = Packed().collate(rows, 0, "cpu")
    assert not {5, 13, 18} & set(batch.targets.places.tolist())  # before another row
    trained = [label for row in rows for label in row.labels[1:] if label != IGNORE]
    assert batch.targets.tokens.tolist() == trained
    assert token_losses(model, batch).shape == (len(trained),)


@settings(deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=40))
def test_blocks_hold_every_row_once_and_keep_to_the_budget(lengths):
    rows = [EncodedRow(str(place), [0] * length, [0] * length) for place, length in enumerate(lengths)]
    packed = blocks(rows)
    assert sorted(row.origin for row in chain.from_iterable(packed)) == sorted(row.origin for row in rows)
    for block in packed:
        assert len(block) == 1 or sum(map(len, block)) <= MICRO_BATCH_TOKENS
    full = sorted(sum(map(len, block)) for block in packed)
    assert len(full) < 2 or full[0] + full[1] > MICRO_BATCH_TOKENS


def test_a_packed_block_is_one_row_of_ids_with_positions_that_start_anew():
    rows = [EncodedRow("a", [5, 6], [5, 6]), EncodedRow("b", [7, 8, 9], [IGNORE, 8, 9])]
    batch = Packed().collate(rows, 0, "cpu")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch.targets.places.tolist() == [0, 2, 3]
    assert batch.targets.tokens.tolist() == [6, 8, 9]
    assert batch.targets.rows.tolist() == [0, 1, 1]


class Mixing(nn.Module):
    """A model whose attention does not heed where packed rows begin."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype

    def forward(self, input_ids, position_ids, use_cache=False):
        mask = torch.ones_like(input_ids)
        return self.model(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=use_cache)


class WithoutPositions(Mixing):
    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Mixing, "packed rows see each other"), (WithoutPositions, "takes no position_ids")]
)
def test_a_model_that_cannot_keep_packed_rows_apart_gets_padded_batches(kind, reason):
    model, rows = kind(tiny_llama()), make_rows(20, 9)
    chosen = choose_batching(model, rows, 2, 0)
    assert chosen.kind == "padded"
    assert reason in chosen.reason
    with pytest.raises(ConfigError, match=f"rows cannot be packed: .*{reason}.*--batching padded"):
        choose_batching(model, rows, 2, 0, "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_rows_apart_may_be_packed(dtype):
    model = tiny_llama().to(dtype)
    assert why_not_packed(model, make_rows(30)[0]) == ""
    assert why_not_packed(model, make_rows(1)[0]) == ""
    assert choose_batching(model, make_rows(30, 3), 2, 0, "packed") == Packed("as given")


def test_on_a_cpu_rows_are_packed_and_attended_to_one_by_one(fresh_base):
    rows = make_rows(24, 200, 300, 500)
    chosen = choose_batching(fresh_base.model, rows, 4, 0)
    assert chosen.kind == "packed"
    # 900 + 500 tokens against 1,024; 30 layers of 576 features; 106.2 million weights a token
    padded, packed = (
        sum(n * (2 * 106.2e6 + 4 * 30 * 576 * length) for n, length in shapes)
        for shapes in ([(900, 300), (500, 500)], [(len(row), len(row)) for row in rows])
    )
    assert (
        f"26.9% of padded batches is padding, and packed blocks take {packed / padded:.2f}" in chosen.reason
    )
    assert fresh_base.model.config._attn_implementation == NAME
    even = choose_batching(fresh_base.model, make_rows(*[150] * 40), 8, 0)
    assert even == Packed(
        "0.0% of padded batches is padding, and packed blocks take 1.00 times their arithmetic"
    )


def test_under_a_mask_rows_of_like_length_are_padded_and_rows_of_spread_length_are_packed(fresh_base):
    model = fresh_base.model
    model.set_attn_implementation("eager")
    like = choose_batching(model, make_rows(*[150, 152] * 40), 8, 0)
    assert like.kind == "padded"
    assert "0.1% of padded batches is padding, and packed blocks take 1.19 times" in like.reason
    spread = choose_batching(model, make_rows(24, 200, 300, 500), 4, 0)
    assert spread.kind == "packed"
    padded, packed = (
        sum(n * (2 * 106.2e6 + 4 * 30 * 576 * length) for n, length in shapes)
        for shapes in ([(900, 300), (500, 500)], [(1024, 1024)])
    )
    assert (
        f"26.9% of padded batches is padding, and packed blocks take {packed / padded:.2f}" in spread.reason
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_arithmetic_is_what_torch_counts(tied):
    model = tiny_llama(tied=tied)
    model.set_attn_implementation("eager")
    shapes = [(3, 40), (1, 200)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for shape in shapes:
            model.model(torch.zeros(shape, dtype=torch.long))
    assert operations(model, shapes) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_given_way_is_kept():
    assert choose_batching(tiny_llama(), make_rows(9), 8, 0, "padded") == Padded("as given")
