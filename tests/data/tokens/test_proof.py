from __future__ import annotations

import copy

import pytest

from rankfold.data.order.batching import Padded
from rankfold.data.shapes.example import Example, Message
from rankfold.data.tokens.encode import IGNORE, EncodedRow, encode, encode_all
from rankfold.data.tokens.proof import prove_mask
from rankfold.errors import DataError


def rows_of(tokenizer, count: int) -> list[EncodedRow]:
    examples = [
        Example(f"f:{n}", (Message("user", ("Count",)), Message("assistant", (" ".join("x" * n),))))
        for n in range(1, count + 1)
    ]
    return encode_all(examples, tokenizer, 512)[0]


def test_the_proof_counts_every_token_and_shows_the_longest_the_shortest_and_others(real_base):
    rows = rows_of(real_base.tokenizer, 9)
    proof = prove_mask(rows, real_base.tokenizer, show=4)
    assert (proof.rows, proof.tokens) == (9, sum(len(row.input_ids) for row in rows))
    assert proof.trained_tokens == sum(n + 1 for n in range(1, 10))  # n words of one token, and the stop
    assert proof.stops == {"<|im_end|>": 9}
    assert [(row.why, row.origin) for row in proof.shown[:2]] == [("longest", "f:9"), ("shortest", "f:1")]
    assert [row.why for row in proof.shown[2:]] == ["by chance", "by chance"]
    assert len({row.origin for row in proof.shown}) == 4
    assert proof.shown[1].pieces[-1] == ("x<|im_end|>", True)
    assert (proof.shown[0].trained_tokens, proof.shown[0].tokens) == (10, len(rows[-1]))


def test_rows_by_chance_are_the_same_for_a_seed_and_others_for_another(real_base):
    rows = rows_of(real_base.tokenizer, 40)
    shown = [
        {row.origin for row in prove_mask(rows, real_base.tokenizer, 6, seed).shown} for seed in (1, 1, 2)
    ]
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(("count", "show", "expected"), [(1, 3, 1), (2, 5, 2), (3, 0, 0)])
def test_no_row_is_shown_twice(real_base, count, show, expected):
    assert len(prove_mask(rows_of(real_base.tokenizer, count), real_base.tokenizer, show).shown) == expected


def test_rows_without_a_trained_token_stop_the_run(real_base):
    with pytest.raises(DataError, match="none of the tokens of these 1 rows is trained"):
        prove_mask([EncodedRow("f", [5, 6], [IGNORE, IGNORE])], real_base.tokenizer)


def test_rows_that_never_train_a_stop_token_stop_the_run(real_base):
    rows = [EncodedRow("f", [5, 2, 6], [5, IGNORE, 6])]
    with pytest.raises(DataError, match=r"no row trains a token that ends an answer \('<\|im_end\|>'\)"):
        prove_mask(rows, real_base.tokenizer)


def test_padding_with_the_stop_token_does_not_unlearn_it(real_base):
    tokenizer = copy.deepcopy(real_base.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    short, long = (
        encode(Example("f", (Message("user", ("a",)), Message("assistant", (text,)))), tokenizer)
        for text in ("b", "b b b b")
    )
    targets = Padded().collate([short, long], tokenizer.pad_token_id, "cpu").targets
    for number, row in enumerate((short, long)):
        own = targets.rows == number
        assert targets.tokens[own][-1] == tokenizer.eos_token_id
        assert targets.places[own][-1] == number * len(long) + len(row) - 2
