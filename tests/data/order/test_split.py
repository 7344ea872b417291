from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankfold.data.order.split import (
    LARGE_GROUP,
    fingerprint,
    near_groups,
    near_leaks,
    split_held_out,
    without_leaks,
)
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.errors import DataError

SAYING = "A proverb of some length that is told in many ways by many people, this being the one of"


def texts(*values: str) -> list[Example]:
    return [Example(f"f:{line}", text=value) for line, value in enumerate(values, start=1)]


def different(count: int) -> list[str]:
    """Texts that are no near copies of each other."""
    return [f"{n * 7919 % 10007} jokes" for n in range(count)]


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (20, 1), (21, 2), (100, 5), (5000, 200)])
def test_five_percent_at_least_one_and_at_most_200_are_held_out(rows, held_out):
    train, held = split_held_out(texts(*different(rows)))
    assert (len(train), len(held)) == (rows - held_out, held_out)
    assert not {fingerprint(e) for e in train} & {fingerprint(e) for e in held}


def test_copies_of_a_held_out_row_are_not_trained_on():
    train, held = split_held_out(texts(*["same"] * 15, *["other"] * 15))
    assert len({e.text for e in train} | {e.text for e in held}) == 2
    assert not {e.text for e in train} & {e.text for e in held}
    assert (len(train), len(held)) == (15, 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), min_size=30, max_size=80))
def test_no_near_copy_stands_on_the_other_side(rows):
    words = [str(word) for word in range(1000, 1400)]
    told = [" ".join(words[kind * 20 : kind * 20 + 20]) for kind in range(16)]
    examples = texts(*(told[kind] + "!" * ends for kind, ends in rows))
    assume(len({kind for kind, _ in rows}) > 1)
    train, held = split_held_out(examples)
    kinds = [{example.text.rstrip("!") for example in side} for side in (train, held)]
    assert not kinds[0] & kinds[1]
    assert len(held) == len(kinds[1])


def test_a_large_group_of_copies_is_trained_on_rather_than_lost():
    copies = [f"{SAYING} it{'!' * n}" for n in range(LARGE_GROUP + 1)]
    for seed in range(8):
        train, held = split_held_out(texts(*copies, *(f"{seed} {text}" for text in different(10))))
        assert len(train) == len(copies) + 9
        assert len(held) == 1


def test_rows_that_are_all_near_copies_are_still_split():
    train, held = split_held_out(texts(*(f"{SAYING} it{'!' * n}" for n in range(4))))
    assert (len(train), len(held)) == (3, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 130), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_adding_a_row_moves_at_most_one_other(count, new, chance):
    rows = different(count)
    added = f"new {new}"
    before = {e.text for e in split_held_out(texts(*rows))[1]}
    more = [*rows, added]
    chance.shuffle(more)
    after = {e.text for e in split_held_out(texts(*more))[1]} - {added}
    assert len(before ^ after) <= 1


def test_adding_a_copy_moves_nothing():
    rows = texts(*different(60))
    before = split_held_out(rows)[1]
    for copied in rows:
        assert split_held_out([*rows, copied])[1] == before


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abc", min_size=20, max_size=24), min_size=20, max_size=60), st.randoms())
def test_groups_do_not_depend_on_where_rows_stand_even_where_all_are_alike(rows, chance):
    shuffled = chance.sample(rows, len(rows))
    found = [
        sorted(sorted(group_rows[row] for row in group) for group in near_groups(texts(*group_rows)))
        for group_rows in (rows, shuffled)
    ]
    assert found[0] == found[1]


def test_the_split_does_not_depend_on_where_rows_stand():
    rows = texts(*different(100))
    assert {e.text for e in split_held_out(rows)[1]} == {e.text for e in split_held_out(rows[::-1])[1]}


def test_rows_that_are_all_the_same_cannot_be_split():
    with pytest.raises(DataError, match="all rows are the same"):
        split_held_out(texts("a", "a"))


def test_a_shared_system_prompt_does_not_make_rows_copies_and_images_tell_them_apart():
    def chat(*parts, system: str = SAYING * 5) -> Example:
        return Example(
            "f:1", (Message("system", (system,)), Message("user", parts), Message("assistant", ("ok",)))
        )

    rows = [
        chat("What is a polar bear?"),
        chat("Why is the sky blue?"),
        chat("What is a polar bear?", system="x"),
    ]
    assert sorted(near_groups(rows)) == [[0, 2]]
    pictures = [chat(Image(Path(name)), "What is this?") for name in ("a.png", "b.png", "a.png")]
    assert sorted(near_groups(pictures)) == [[0, 2]]


def test_leaks_are_taken_out_and_named():
    train, leaked = without_leaks(texts("a", "b", "c"), texts("x", "b"))
    assert ([e.text for e in train], leaked) == (["a", "c"], ["f:2"])
    with pytest.raises(DataError, match="nothing is left"):
        without_leaks(texts("a"), texts("a"))


def test_near_copies_of_rows_held_out_are_named():
    assert near_leaks(texts("a", SAYING, "c"), texts("x", SAYING + "!", "x")) == ["f:2"]


def pictured(*names: str, question: str = "What is it?") -> list[Example]:
    return [
        Example(
            f"f:{line}", (Message("user", (Image(Path(name)), question)), Message("assistant", ("A hat.",)))
        )
        for line, name in enumerate(names, start=1)
    ]


def test_images_whose_names_are_alike_are_no_near_copies():
    folder = "/a/folder/with/a/long/name/that/all/of/the/images/share"
    examples = pictured(*(f"{folder}/{number:04}.png" for number in range(40)))
    assert near_groups(examples) == []
    assert near_leaks(examples[:30], examples[30:]) == []


def test_the_same_image_with_nearly_the_same_words_is_a_near_copy():
    asked = [*pictured("hat.png", question="What do you see in it?")]
    asked += pictured("hat.png", question="What do you see in it??")
    assert near_groups(asked) == [[0, 1]]
