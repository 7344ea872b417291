from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.data.tokens.rows_hash import rows_hash
from rankfold.errors import CheckpointError
from rankfold.train.keeping.identity import refuse_other_identity

ids = st.lists(st.integers(0, 200_000), max_size=5)
rows = st.lists(st.tuples(ids, st.integers(0, 5)), max_size=4)


def encoded(lists) -> list[EncodedRow]:
    return [
        EncodedRow("f:1", row, [IGNORE] * cut + row[cut:])
        for row, cut in ((r, min(c, len(r))) for r, c in lists)
    ]


@given(rows, rows)
def test_rows_have_one_hash_only_if_they_are_the_same(one, other):
    first, second = encoded(one), encoded(other)
    same = [(r.input_ids, r.labels) for r in first] == [(r.input_ids, r.labels) for r in second]
    assert (rows_hash(first) == rows_hash(second)) == same


@given(rows)
def test_the_order_of_rows_counts(lists):
    turned = lists[::-1]
    assume(lists != turned and encoded(lists) != encoded(turned))
    assert rows_hash(encoded(lists)) != rows_hash(encoded(turned))


IDENTITY = {
    "train_rows": "a",
    "held_out_rows": "b",
    "base": {"shapes": "c", "values": "d", "storage": "bfloat16"},
    "computed_by": {"rankfold": "0.1", "torch": "2.13"},
}


def test_everything_that_has_changed_is_listed():
    changed = IDENTITY | {"train_rows": "x", "base": {}}
    with pytest.raises(CheckpointError, match=r"the training rows(.|\n)*the base model is another one"):
        refuse_other_identity(IDENTITY, changed, Path("run"))


def test_other_versions_are_told_and_accepted():
    now = IDENTITY | {"computed_by": {"rankfold": "0.1", "torch": "2.14"}}
    assert refuse_other_identity(IDENTITY, now, Path("run")) == [
        "not bit for bit what it would have been: torch 2.13 -> 2.14"
    ]
    assert refuse_other_identity(IDENTITY, IDENTITY, Path("run")) == []


def test_a_record_without_an_identity_is_refused():
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        refuse_other_identity(None, IDENTITY, Path("run"))
