"""How long rows are, many at a time: in tokens as a model will see them, or in characters without one."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from rankfold.data.shapes.example import Example
from rankfold.data.tokens.encode import EncodedRow, encode_each
from rankfold.errors import DataError
from rankfold.models.messages.images import ImageReader

EXACT_ROWS = 10_000  # so many rows are encoded as in training; most data sets have no more
BATCH_ROWS = 2_000
BATCH_CHARS = 2_000_000
MOST_KINDS = 10_000  # kinds of conversation whose template overhead is remembered
MOST_UINT32 = 2**32 - 1

Kind = tuple[str, ...]
Waiting = tuple[int, Example, list[str], bool]  # row, example, its texts, whether it must be encoded


class Measured:
    """Row numbers and lengths.  Where a template makes several training rows of one row, ``lengths`` has
    the longest and ``shortest`` the shortest of them.  ``trained`` counts the trained tokens of all rows."""

    def __init__(self) -> None:
        self.rows = array("I")
        self.lengths = array("I")
        self.shortest = array("I")
        self.trained = 0
        self.refused: list[tuple[int, str]] = []  # rows that cannot be encoded, and why

    def append(self, row: int, length: int, shortest: int, trained: int = 0) -> None:
        self.rows.append(row)
        self.lengths.append(min(length, MOST_UINT32))
        self.shortest.append(min(shortest, MOST_UINT32))
        self.trained += trained


class Meter(Protocol):
    """Takes rows as they come; what it found is complete after ``finish``."""

    unit: str
    measured: Measured

    def add(self, row: int, example: Example, *, exact: bool = False) -> None: ...

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


def _answered(example: Example, counts: list[int]) -> int:
    """How much of the row's length is words that are trained by default."""
    if not example.messages:
        return counts[0]
    return sum(
        count for turn, count in zip(example.messages, counts, strict=False) if turn.role == "assistant"
    )


class CharacterMeter:
    """Counts the characters of the messages alone."""

    unit = "characters"

    def __init__(self) -> None:
        self.measured = Measured()

    def add(self, row: int, example: Example, *, exact: bool = False) -> None:
        length = _total(example, [len(text) for text in texts_of(example)])
        self.measured.append(row, length, length)

    def finish(self) -> None:
        pass


class TokenMeter:
    """Counts tokens, on a thread of its own: the tokenizer leaves the interpreter free.

    The first EXACT_ROWS rows are encoded as training does.  After that only rows that could hold a surprise
    are: those that are added as ``exact``, those with tools, thoughts, images or train flags, with roles in
    an order not seen yet, or with a character not seen yet.  Of the others the words are counted, and what
    the template adds is what it mostly added to rows with the same roles; a token that joins words and
    template can make that count differ by one."""

    unit = "tokens"

    def __init__(self, tokenizer: Any, reader: ImageReader | None = None) -> None:
        self._reader = reader
        self.measured = Measured()
        self._tokenizer = tokenizer
        self._added: dict[Kind, Counter[tuple[int, int]]] = {}  # tokens and trained tokens, how often
        self._spelt: set[str] = set()  # characters that the vocabulary is known to spell
        self._waiting: list[Waiting] = []
        self._waiting_chars = 0
        self._executor = ThreadPoolExecutor(1)
        self._running: deque[Future[None]] = deque()

    def add(self, row: int, example: Example, *, exact: bool = False) -> None:
        """The next row; ``exact`` if its words are not to be counted without the template."""
        texts = texts_of(example)
        self._waiting.append((row, example, texts, exact))
        self._waiting_chars += sum(map(len, texts))
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

    def _measure(self, batch: list[Waiting]) -> None:
        every = iter(token_counts(self._tokenizer, [text for _, _, texts, _ in batch for text in texts]))
        counts = [[next(every) for _ in texts] for _, _, texts, _ in batch]
        unknown = self._not_known(batch)
        encoded = encode_each((batch[place][1] for place in unknown), self._tokenizer, reader=self._reader)
        for place, (_, rows) in zip(unknown, encoded, strict=True):
            self._learn(batch[place], rows, counts[place])
        for place in sorted(set(range(len(batch))).difference(unknown)):
            row, example, _, _ = batch[place]
            [((more, trained), _)] = self._added[_kind(example)].most_common(1)
            length = _total(example, counts[place]) + more
            self.measured.append(row, length, length, _answered(example, counts[place]) + trained)

    def _not_known(self, batch: list[Waiting]) -> list[int]:
        """The places of the rows that must be encoded."""
        if len(self.measured.rows) < EXACT_ROWS:
            return list(range(len(batch)))
        strange = set("".join(text for _, _, texts, _ in batch for text in texts)) - self._spelt
        return [
            place
            for place, (_, example, texts, exact) in enumerate(batch)
            if exact or _kind(example) not in self._added or not all(map(strange.isdisjoint, texts))
        ]

    def _learn(self, waiting: Waiting, encoded: list[EncodedRow] | DataError, counts: list[int]) -> None:
        row, example, texts, exact = waiting
        if isinstance(encoded, DataError):
            self.measured.refused.append((row, str(encoded)))
            return
        self._spelt.update(*texts)
        longer = _longer_rejected(example, counts)
        lengths = [len(one) + longer for one in encoded]
        trained = sum(one.trained_tokens for one in encoded)
        self.measured.append(row, max(lengths), min(lengths), trained)
        kind = _kind(example)
        if kind and not exact and len(lengths) == 1 and len(self._added) < MOST_KINDS:
            added = lengths[0] - _total(example, counts), trained - _answered(example, counts)
            self._added.setdefault(kind, Counter())[added] += 1


def _kind(example: Example) -> Kind:
    """What decides how much the template adds: the roles.  Empty if every row must be looked at."""
    turns = example.messages
    if example.tools:
        return ()
    for turn in turns:
        if turn.tool_calls or turn.reasoning or turn.images or turn.train is not None:
            return ()
    return tuple(turn.role for turn in turns) or ("text",)


def token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, without special tokens around it."""
    if tokenizer.is_fast:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in encoded]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
