"""The rows whose mask is shown: some at random, the longest and the shortest."""

from __future__ import annotations

import random

from rankfold.data.shapes.example import Example


class Picked:
    """Keeps ``count`` of the rows that are offered, each with the same chance (Vitter 1985, algorithm R),
    and the longest and the shortest of all.  Nothing is kept for a ``count`` of 0."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._random = random.Random(seed)
        self._offered = 0
        self._sample: list[Example] = []
        self._longest: tuple[int, Example] | None = None
        self._shortest: tuple[int, Example] | None = None

    def offer(self, example: Example, length: int) -> None:
        if not self.count:
            return
        self._offered += 1
        if len(self._sample) < self.count:
            self._sample.append(example)
        elif (place := self._random.randrange(self._offered)) < self.count:
            self._sample[place] = example
        if self._longest is None or length > self._longest[0]:
            self._longest = length, example
        if self._shortest is None or length < self._shortest[0]:
            self._shortest = length, example

    def examples(self) -> list[Example]:
        """The random ones, then the longest and the shortest, each once."""
        ends = [pair[1] for pair in (self._longest, self._shortest) if pair]
        return list({example.origin: example for example in (*self._sample, *ends)}.values())
