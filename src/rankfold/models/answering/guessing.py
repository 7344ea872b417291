"""What may come next, as it came before: a guess that the model only has to confirm.

Where a product with few rows takes as long as one with one, a row that is alone reads its last token and the
guess together, and keeps what it would have said anyway.  Saxena 2023 (Prompt Lookup Decoding)."""

from __future__ import annotations

from collections.abc import Sequence

GUESSED = 4  # tokens, at most
LOOKED_UP = (3, 2)  # so many last tokens are looked for among those before


def guessed(ids: Sequence[int], most: int) -> list[int]:
    """Up to ``most`` tokens that followed the last time when the last tokens stood in ``ids``."""
    for count in LOOKED_UP:
        last = ids[-count:]
        for place in range(len(ids) - count - 1, -1, -1):
            if ids[place + count - 1] == last[-1] and ids[place : place + count] == last:
                return list(ids[place + count : place + count + most])
    return []
