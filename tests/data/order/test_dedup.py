"""The near-duplicate finder against sets of shingles that are compared pair by pair."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.data.order.dedup import THRESHOLD, NearDuplicates

ENGLISH = "A man walks into a bar with a slab of asphalt under his arm and orders two drinks for the road"
CHINESE = "从前有一只北极熊觉得无聊，就开始拔自己的毛，一根、两根、三根，最后拔光了，它说：好冷啊，今天真冷。"
GAP = "\0" * 4


def shingles(text: str) -> set[str]:
    padded = GAP + " ".join(text.replace("\0", " ").casefold().split()) + GAP
    return {padded[i : i + 5] for i in range(len(padded) - 4)}


def jaccard(left: str, right: str) -> float:
    one, other = shingles(left), shingles(right)
    return len(one & other) / len(one | other)


def groups_of(texts: list[str]) -> list[list[int]]:
    finder = NearDuplicates()
    for text in texts:
        finder.add(text)
    return finder.groups()


def brute_force(texts: list[str]) -> list[list[int]]:
    """The connected groups of all pairs at or above the threshold."""
    groups = [{row} for row in range(len(texts))]
    for one, other in combinations(range(len(texts)), 2):
        if jaccard(texts[one], texts[other]) >= THRESHOLD:
            joined = [group for group in groups if one in group or other in group]
            groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return sorted(sorted(group) for group in groups if len(group) > 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=40), st.text("ab c", max_size=8)), max_size=12))
def test_no_row_stands_in_a_group_without_a_near_copy_in_it(texts):
    for group in groups_of(texts):
        assert len(group) > 1
        for row in group:
            assert any(jaccard(texts[row], texts[other]) >= THRESHOLD for other in group if other != row)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_exact_copies_always_share_a_group_whatever_their_case_and_white_space(texts, chance):
    again = [text.replace(" ", " \t ") + "\n" for text in texts]
    mixed = [*texts, *again]
    order = list(range(len(mixed)))
    chance.shuffle(order)
    group_of = {
        order[row]: place
        for place, group in enumerate(groups_of([mixed[row] for row in order]))
        for row in group
    }
    for row in range(len(texts)):
        assert group_of[row] == group_of[row + len(texts)]


def edited(text: str, edits: int, chance: random.Random) -> str:
    letters = list(text)
    for place in chance.sample(range(len(letters)), edits):
        letters[place] = chance.choice("甲乙丙丁qxzj")
    return "".join(letters)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_brute_force(seed):
    chance = random.Random(seed)
    words = (ENGLISH + " " + " ".join(CHINESE)).split()
    texts = []
    for _ in range(60):
        text = " ".join(chance.choices(words, k=chance.randint(5, 40)))
        texts += [text, *(edited(text, chance.randint(0, 4), chance) for _ in range(2))]
    chance.shuffle(texts)
    assert groups_of(texts) == brute_force(texts)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_one_changed_letter_is_a_near_copy_and_another_text_is_none(text):
    texts = [text, edited(text, 1, random.Random(0)), text[: len(text) // 2], "Something else entirely."]
    assert groups_of(texts) == [[0, 1]]


def test_nearly_all_pairs_at_the_threshold_are_found():
    chance = random.Random(1)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    texts, wanted = [], 0
    while wanted < 400:
        text = "".join(chance.choices(letters, k=100))
        other = edited(text, chance.randint(1, 2), chance)
        if 0.8 <= jaccard(text, other) < 0.92:
            texts += [text, other]
            wanted += 1
    assert len(groups_of(texts)) >= 0.98 * wanted


def test_rows_of_one_template_that_differ_enough_are_left_apart():
    texts = [f"{n * 7919:08d} asks for {n * 104729:012d} of {n * 1299709:012d}" for n in range(2000)]
    assert groups_of(texts) == []


def test_short_and_empty_texts_are_told_apart():
    texts = ["", "a", "b", "joke 1", "joke 12", "", "joke 1", "\ud800", "\x00"]
    assert groups_of(texts) == [[0, 5, 8], [3, 6]]


def test_rows_may_be_added_after_the_groups_were_asked_for():
    finder = NearDuplicates()
    assert finder.groups() == []
    finder.add(ENGLISH)
    assert finder.groups() == []
    finder.add(ENGLISH.upper())
    assert finder.groups() == [[0, 1]]
