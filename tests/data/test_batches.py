from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.data.batches import MICRO_BATCH_TOKENS, collate, epoch_steps, micro_batches
from rankfold.data.encode import IGNORE, EncodedRow

lengths = st.lists(st.integers(2, 600), min_size=1, max_size=60)


def make_rows(lengths: list[int]) -> list[EncodedRow]:
    return [
        EncodedRow(f"f:{place}", list(range(length)), [IGNORE, *range(1, length)])
        for place, length in enumerate(lengths)
    ]


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(lengths, rows_per_step, seed):
    rows = make_rows(lengths)
    steps = list(epoch_steps(rows, rows_per_step, seed))
    seen = [row.origin for step in steps for group in step for row in group]
    assert sorted(seen) == sorted(row.origin for row in rows)
    assert all(sum(map(len, step)) <= rows_per_step for step in steps)


@settings(deadline=None)
@given(lengths)
def test_micro_batches_keep_to_the_token_budget(lengths):
    for group in micro_batches(make_rows(lengths)):
        assert len(group) == 1 or len(group) * max(map(len, group)) <= MICRO_BATCH_TOKENS


def test_the_order_depends_on_the_seed_alone():
    rows = make_rows(list(range(2, 80)))
    orders = [[[g[0].origin for g in step] for step in epoch_steps(rows, 4, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_little_is_padded():
    torch.manual_seed(0)
    rows = make_rows(torch.randint(20, 200, (300,)).tolist())
    groups = [group for step in epoch_steps(rows, 8, 0) for group in step]
    padded = sum(len(group) * max(map(len, group)) for group in groups)
    assert padded < 1.12 * sum(map(len, rows))


def test_collating_pads_on_the_right():
    batch = collate(make_rows([2, 4]), pad_id=9, device="cpu")
    assert batch["input_ids"].tolist() == [[0, 1, 9, 9], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 1, IGNORE, IGNORE], [IGNORE, 1, 2, 3]]
