from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.data.shapes import example_store
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.shapes.example_store import ExampleStore, Joined, pick, unpacked
from rankfold.data.shapes.example_store import packed as pack

texts = st.text(max_size=8) | st.just("half \ud800")
calls = st.just(({"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, "x"]}}},))
parts = st.lists(texts | st.text("ab", min_size=1).map(lambda name: Image(Path(name))), max_size=3).map(tuple)
messages = st.builds(
    Message,
    st.sampled_from(["user", "assistant", "tool", "narrator"]),
    parts,
    st.none() | st.booleans(),
    st.sampled_from([1.0, 0.5, 3.0]),
    texts,
    st.just(()) | calls,
    texts,
    texts,
)
several = st.lists(messages, max_size=3).map(tuple)
examples = st.builds(
    Example, texts, several, texts, st.just(()) | calls, several, st.none() | st.booleans(), st.none() | texts
)


@given(examples)
def test_an_example_is_read_back_as_it_was(example):
    assert unpacked(pack(example)) == example


@settings(deadline=None)
@given(st.lists(examples, max_size=12), st.integers(0, 12), st.data())
def test_few_or_many_the_examples_are_the_same(rows, few, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_store, "FEW", few)
        store = ExampleStore()
        for row in rows:
            store.append(row)
        assert len(store) == len(rows)
        assert list(store) == rows
        assert store[:] == rows
        places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
        some = pick(store, places)
        assert (list(some), some[:], len(some)) == ([rows[p] for p in places],) * 2 + (len(places),)
        assert list(Joined(store, some)) == rows + [rows[place] for place in places]
        one, other = iter(store), iter(store)
        assert list(zip(one, other, strict=True)) == [(row, row) for row in rows]
