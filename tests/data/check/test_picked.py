from __future__ import annotations

from collections import Counter

from rankfold.data.check.picked import Picked
from rankfold.data.shapes.example import Example


def offered(count: int, rows: int, seed: int = 0) -> list[str]:
    picked = Picked(count, seed)
    for row in range(rows):
        picked.offer(
            Example(f"f:{row}", text="x"), 10 + row % 7 + (100 if row == 5 else 0) - (9 if row == 8 else 0)
        )
    return [example.origin for example in picked.examples()]


def test_the_longest_and_the_shortest_are_always_there():
    origins = offered(2, 50)
    assert {"f:5", "f:8"} <= set(origins)
    assert 2 <= len(origins) <= 4


def test_nothing_is_kept_when_nothing_is_shown():
    assert offered(0, 50) == []


def test_a_seed_gives_the_same_rows_again():
    assert offered(3, 500, seed=1) == offered(3, 500, seed=1) != offered(3, 500, seed=2)


def test_every_row_has_the_same_chance():
    draws = 4000
    counts = Counter(origin for seed in range(draws) for origin in offered(1, 10, seed)[:1])
    assert set(counts) == {f"f:{row}" for row in range(10)}
    # Binomial(4000, 1/10): five standard deviations are 95.
    assert all(abs(count - draws / 10) < 95 for count in counts.values())
