"""How long rows are, many at a time: in tokens as a model will see them, or in characters without one."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from rankfold.data.encode import encode
from rankfold.data.example import Example
from rankfold.errors import DataError

EXACT_ROWS = 10_000  # so many rows are encoded as in training; most data sets have no more
BATCH_ROWS = 2_000
BATCH_CHARS = 2_000_000
MOST_KINDS = 10_000  # kinds of conversation whose template overhead is remembered
MOST_UINT32 = 2**32 - 1

Kind = tuple[str, ...]


class Measured:
    """Row numbers and lengths.  Where a template makes several training rows of one row, ``lengths`` has
    the longest and ``shortest`` the shortest of them."""

    def __init__(self) -> None:
        self.rows = array("I")
        self.lengths = array("I")
        self.shortest = array("I")
        self.refused: list[tuple[int, str]] = []  # rows that cannot be encoded, and why

    def append(self, row: int, length: int, shortest: int | None = None) -> None:
        self.rows.append(row)
        self.lengths.append(min(length, MOST_UINT32))
        self.shortest.append(min(length if shortest is None else shortest, MOST_UINT32))


class Meter(Protocol):
    """Takes rows as they come; what it found is complete after ``finish``."""

    unit: str
    measured: Measured

    def add(self, row: int, example: Example) -> None: ...

    def finish(self) -> None: ...


def texts_of(example: Example) -> list[str]:
    """The words of each message in order, or the running text; a preference row's rejected turns last."""
    turns = (*example.messages, *example.rejected)
    return [turn.text for turn in turns] if turns else [example.text]


def _total(example: Example, counts: list[int]) -> int:
    """The row's length from those of its texts.  Of two answers the longer counts."""
    answered = len(example.messages) or 1
    return sum(counts[:answered]) + _longer_rejected(example, counts)


def _longer_rejected(example: Example, counts: list[int]) -> int:
    """By how much the rejected turns are longer than the chosen ones in their place."""
    if not example.rejected:
        return 0
    chosen = counts[len(example.messages) - len(example.rejected) : len(example.messages)]
    return max(0, sum(counts[len(example.messages) :]) - sum(chosen))


class CharacterMeter:
    """Counts the characters of the messages alone."""

    unit = "characters"

    def __init__(self) -> None:
        self.measured = Measured()

    def add(self, row: int, example: Example) -> None:
        self.measured.append(row, _total(example, [len(text) for text in texts_of(example)]))

    def finish(self) -> None:
        pass


class TokenMeter:
    """Counts tokens, on a thread of its own: the tokenizer leaves the interpreter free.

    The first EXACT_ROWS rows are encoded as training does.  After that only rows that could hold a surprise
    are: those with tools, thoughts or images, with roles in an order not seen yet, or with a character not
    seen yet.  Of the others the words are counted, and what the template adds is what it mostly added to
    rows with the same roles; a token that joins words and template can make that count differ by one."""

    unit = "tokens"

    def __init__(self, tokenizer: Any) -> None:
        self.measured = Measured()
        self._tokenizer = tokenizer
        self._added: dict[Kind, Counter[int]] = {}
        self._spelt: set[str] = set()  # characters that the vocabulary is known to spell
        self._waiting: list[tuple[int, Example]] = []
        self._waiting_chars = 0
        self._executor = ThreadPoolExecutor(1)
        self._running: deque[Future[None]] = deque()

    def add(self, row: int, example: Example) -> None:
        self._waiting.append((row, example))
        self._waiting_chars += sum(map(len, texts_of(example)))
        if len(self._waiting) >= BATCH_ROWS or self._waiting_chars >= BATCH_CHARS:
            self._submit()

    def finish(self) -> None:
        self._submit()
        while self._running:
            self._running.popleft().result()
        self._executor.shutdown()

    def _submit(self) -> None:
        if len(self._running) > 1:  # do not read much faster than can be counted
            self._running.popleft().result()
        self._running.append(self._executor.submit(self._measure, self._waiting))
        self._waiting, self._waiting_chars = [], 0

    def _measure(self, batch: list[tuple[int, Example]]) -> None:
        texts = [texts_of(example) for _, example in batch]
        counts = iter(token_counts(self._tokenizer, [text for several in texts for text in several]))
        strange = set("".join(text for several in texts for text in several)) - self._spelt
        exact = len(self.measured.rows) < EXACT_ROWS
        for (row, example), words in zip(batch, texts, strict=True):
            of_words = [next(counts) for _ in words]
            known = not exact and self._added.get(_kind(example))
            if known and all(strange.isdisjoint(text) for text in words):
                self.measured.append(row, _total(example, of_words) + known.most_common(1)[0][0])
            else:
                self._encode(row, example, of_words, words)

    def _encode(self, row: int, example: Example, of_words: list[int], words: list[str]) -> None:
        try:
            lengths = [len(encode(example, self._tokenizer))]
        except DataError as error:
            self.measured.refused.append((row, str(error)))
            return
        self._spelt.update(*words)
        longer = _longer_rejected(example, of_words)
        self.measured.append(row, max(lengths) + longer, min(lengths))
        kind = _kind(example)
        if kind and len(lengths) == 1 and len(self._added) < MOST_KINDS:
            added = lengths[0] + longer - _total(example, of_words)
            self._added.setdefault(kind, Counter())[added] += 1


def _kind(example: Example) -> Kind:
    """What decides how much the template adds: the roles.  Empty if every row must be looked at."""
    turns = example.messages
    if example.tools or any(turn.tool_calls or turn.reasoning or turn.images for turn in turns):
        return ()
    return tuple(turn.role for turn in turns) or ("text",)


def token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, without special tokens around it."""
    if tokenizer.is_fast:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in encoded]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
