from __future__ import annotations

import json
from itertools import chain, combinations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import GSM8K, needs_gsm8k
from rankfold.data.order.batches import (
    MICRO_BATCH_TOKENS,
    epoch_order,
    epoch_steps,
    micro_batches,
    share,
)
from rankfold.data.order.batching import Padded
from rankfold.data.shapes.example import Example, Message
from rankfold.data.tokens.encode import IGNORE, EncodedRow, encode_all

lengths = st.lists(st.integers(2, 600), min_size=1, max_size=60)


def make_rows(lengths: list[int]) -> list[EncodedRow]:
    return [
        EncodedRow(f"f:{place}", list(range(length)), [IGNORE, *range(1, length)])
        for place, length in enumerate(lengths)
    ]


def gsm8k_rows(tokenizer: Any) -> list[EncodedRow]:
    lines = GSM8K.read_text(encoding="utf-8").splitlines()
    turns = [
        [Message("user", (row["question"],)), Message("assistant", (row["answer"],))]
        for row in map(json.loads, lines)
    ]
    return encode_all([Example(f"f:{n}", tuple(pair)) for n, pair in enumerate(turns)], tokenizer, 1024)[0]


def origins(steps) -> list[list[str]]:
    return [[row.origin for row in step] for step in steps]


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(lengths, rows_per_step, seed):
    rows = make_rows(lengths)
    steps = list(epoch_steps(rows, rows_per_step, seed))
    assert sorted(chain.from_iterable(origins(steps))) == sorted(row.origin for row in rows)
    assert all(len(step) <= rows_per_step for step in steps)
    assert len(steps) == -(-len(rows) // rows_per_step) or len(steps) > len(rows) // rows_per_step


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.data())
def test_an_epoch_goes_on_from_any_step_as_if_it_had_not_stopped(lengths, rows_per_step, seed, epoch, data):
    rows = make_rows(lengths)
    whole = origins(epoch_steps(rows, rows_per_step, seed, epoch))
    done = data.draw(st.integers(0, len(whole)))
    assert origins(epoch_steps(rows, rows_per_step, seed, epoch, start=done)) == whole[done:]


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_the_shares_of_all_processes_are_the_step_of_one(lengths, rows_per_step, processes, seed):
    for step in epoch_steps(make_rows(lengths), rows_per_step, seed):
        shares = [share(step, process, processes) for process in range(processes)]
        assert sorted(chain.from_iterable(origins(shares))) == sorted(row.origin for row in step)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(lengths)
def test_micro_batches_keep_to_the_token_budget(lengths):
    for group in micro_batches(make_rows(lengths)):
        assert len(group) == 1 or len(group) * max(map(len, group)) <= MICRO_BATCH_TOKENS


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = make_rows(list(range(2, 80)))
    wanted = [(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]
    orders = [origins(epoch_steps(rows, 4, seed, epoch)) for seed, epoch in wanted]
    assert orders[0] == orders[1]
    assert all(one != other for one, other in combinations(orders[1:], 2))


def test_an_order_that_was_written_down_is_still_given():
    """A run is resumed by a later version too, so the order may not change."""
    order = epoch_order([5, 9, 2, 7, 3, 8, 4, 6, 1], rows_per_step=2, seed=3, epoch=1)
    assert order == [[6], [2, 5], [3, 1], [8, 7], [4, 0]]


def test_rows_of_a_small_file_do_not_meet_the_same_rows_in_every_epoch():
    rows = make_rows(list(range(2, 50)))
    meetings = [{frozenset(step) for step in origins(epoch_steps(rows, 4, 0, epoch))} for epoch in (0, 1)]
    assert len(meetings[0] & meetings[1]) <= 2


@needs_gsm8k
def test_under_two_percent_of_gsm8k_is_padding_at_batch_8(real_base):
    rows = gsm8k_rows(real_base.tokenizer)
    for seed in range(3):
        groups = [group for step in epoch_steps(rows, 8, seed) for group in micro_batches(step)]
        processed = sum(len(group) * max(map(len, group)) for group in groups)
        assert 1 - sum(map(len, rows)) / processed < 0.02


def test_collating_pads_on_the_right():
    batch = Padded().collate(make_rows([2, 4]), pad_id=9, device="cpu")
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 9, 9], [0, 1, 2, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.targets.places.tolist() == [0, 4, 5, 6]
    assert batch.targets.tokens.tolist() == [1, 1, 2, 3]
    assert batch.targets.rows.tolist() == [0, 1, 1, 1]
    assert (batch.targets.weights.tolist(), batch.targets.weight) == ([1.0] * 4, 4.0)
