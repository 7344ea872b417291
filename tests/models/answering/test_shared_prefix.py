from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankfold.models.answering.shared_prefix import LEAST, common, reused

IDS = st.lists(st.integers(0, 2), max_size=30)


@given(IDS, IDS)
def test_the_common_beginning_is_what_zipping_finds(one, other):
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common(one, other) == expected


@given(IDS.filter(bool), st.lists(IDS, max_size=4))
def test_what_is_reused_is_held_and_never_the_last_token(ids, held):
    place, tokens = reused(ids, held)
    best = max((common(ids, each) for each in held), default=0)
    assert tokens == (0 if min(best, len(ids) - 1) < LEAST else min(best, len(ids) - 1))
    assert not tokens or held[place][:tokens] == ids[:tokens]
