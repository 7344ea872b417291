"""What the rows are made of: scripts, languages, labels, and how long they are.

Languages are a rough count, made to see that one is missing or drowns the others.  The script is read
from Unicode's ranges.  Languages in Latin letters are told apart by a few of their commonest words; a row
with too few of them, and every other language in Latin letters, counts as "Latin, language unknown"."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from rankfold.data.shapes.example import Example

SAMPLED_CHARS = 300  # of a row; enough to tell its script
MOST_LABELS = 1_000  # counted apart; further ones are counted together
CUT_PERCENTILE = 99
HISTOGRAM_BARS = 24

_SCRIPTS = re.compile(
    r"(?P<Latin>[A-Za-zÀ-ɏ]+)|(?P<Chinese>[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+)"
    r"|(?P<Japanese>[\u3040-\u30ff]+)|(?P<Korean>[\u1100-\u11ff\uac00-\ud7af]+)"
    r"|(?P<Cyrillic>[\u0400-\u052f]+)|(?P<Arabic>[\u0600-\u06ff\u0750-\u077f]+)"
    r"|(?P<Hebrew>[\u0590-\u05ff]+)|(?P<Greek>[\u0370-\u03ff]+)|(?P<Devanagari>[\u0900-\u097f]+)"
    r"|(?P<Bengali>[\u0980-\u09ff]+)|(?P<Tamil>[\u0b80-\u0bff]+)|(?P<Thai>[\u0e00-\u0e7f]+)"
)
_LETTER = re.compile(r"[A-Za-zÀ-ɏ]")
# Words that are common in one language and rare in the others.
_COMMON_WORDS = {
    "English": "the and of to is was that what how for with you are this have does many his they which",
    "German": "der die das und ist nicht ein eine mit zu auf ich wie wird sind für von dem werden",
    "French": "le les des est une dans et du qui pour que pas sur avec vous comment ce cette sont",
    "Spanish": "el los las una es por con del para como y más qué está pero son su lo hay",
    "Italian": "il di che è per una non sono della gli con più come del nel ma alla questo perché",
    "Portuguese": "o os uma não é do da em para com que dos mais como são você ao isso por pela",
    "Dutch": "het een van en niet zijn voor dat op met wat hoe deze maar aan er ik wordt naar",
    "Indonesian": "yang dan di dengan untuk dari ini itu adalah pada tidak dalam akan apa bagaimana saya",
    "Turkish": "bir ve bu için ile çok ne daha gibi olan değil nasıl ben var en olarak kadar",
    "Vietnamese": "là và của có không các cho được một những trong với này để như người khi",
}
_LANGUAGES: dict[str, tuple[str, ...]] = {}
for _language, _words in _COMMON_WORDS.items():
    for _word in _words.split():
        _LANGUAGES[_word] = (*_LANGUAGES.get(_word, ()), _language)
LEAST_WORDS = 2  # common words of a language that a row must have more of than of any other


def language_of(text: str) -> str:
    """The language, or the script, that most of the text's first letters belong to."""
    sample = text[:SAMPLED_CHARS]
    if sample.isascii():
        return _latin_language(sample)
    letters: Counter[str] = Counter()
    for run in _SCRIPTS.finditer(sample):
        letters[run.lastgroup or ""] += run.end() - run.start()
    if not letters:
        return "no letters"
    # Japanese is written with Chinese characters too, and kana stand in every sentence of it.
    if letters["Japanese"] * 10 > letters["Chinese"]:
        letters["Japanese"] += letters.pop("Chinese", 0)
    script = max(letters, key=letters.__getitem__)
    return _latin_language(sample) if script == "Latin" else script


def _latin_language(sample: str) -> str:
    words = set(sample.lower().split())
    votes: dict[str, int] = {}
    for word in _LANGUAGES.keys() & words:
        for language in _LANGUAGES[word]:
            votes[language] = votes.get(language, 0) + 1
    ranked = sorted(votes.items(), key=lambda vote: -vote[1])
    if ranked and ranked[0][1] >= LEAST_WORDS and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
        return ranked[0][0]
    return "Latin, language unknown" if _LETTER.search(sample) else "no letters"


@dataclass
class Balance:
    """Counters over the rows: languages, shapes, and labels, of which at most MOST_LABELS apart."""

    languages: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    other_labels: int = 0

    def add(self, example: Example, language: str) -> None:
        self.languages[language] += 1
        if example.label is not None:
            self._add_label(example.label)
        elif example.desirable is not None:
            self._add_label("a good answer" if example.desirable else "a bad answer")

    def _add_label(self, label: str) -> None:
        if label in self.labels or len(self.labels) < MOST_LABELS:
            self.labels[label] += 1
        else:
            self.other_labels += 1


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the rows are, in ``unit`` (tokens or characters), the length that is chosen (``cut``), and
    how many rows are longer (``over``)."""

    unit: str
    shortest: int
    median: int
    mean: float
    percentile_99: int
    longest: int
    total: int
    cut: int
    over: int
    reason: str
    bars: list[tuple[int, int]]  # (upper end, inclusive; rows) of each bar of the histogram


def summarise(lengths: array[int], unit: str, most: int | None, asked: int | None) -> Lengths:
    """Describe ``lengths`` and choose the cut: what was ``asked`` for, or else the 99th percentile, rounded
    up to a multiple of 64 (of 256 for characters), and never more than ``most``.  There must be rows."""
    values = np.sort(np.frombuffer(lengths, dtype=np.uint32))
    at_99 = int(values[math.ceil(len(values) * CUT_PERCENTILE / 100) - 1])
    step = 64 if unit == "tokens" else 256
    rounded = math.ceil(at_99 / step) * step
    cut = asked or (min(rounded, most) if most else rounded)
    if asked:
        reason = "as asked"
    elif most and rounded > most:
        reason = f"the model's longest input; the 99th percentile is {at_99:,}"
    else:
        reason = f"the 99th percentile ({at_99:,}), rounded up to a multiple of {step}"
    return Lengths(
        unit=unit,
        shortest=int(values[0]),
        median=int(values[(len(values) - 1) // 2]),
        mean=float(values.mean()),
        percentile_99=at_99,
        longest=int(values[-1]),
        total=int(values.sum(dtype=np.int64)),
        cut=cut,
        over=int(len(values) - np.searchsorted(values, cut, side="right")),
        reason=reason,
        bars=_histogram(values),
    )


def _histogram(values: np.ndarray) -> list[tuple[int, int]]:
    """Bars up to the 99.9th percentile, and one more for what lies beyond it, however far."""
    top = max(1, int(values[math.ceil(len(values) * 0.999) - 1]))
    width = math.ceil(top / HISTOGRAM_BARS)
    ends = [width * place for place in range(1, math.ceil(top / width) + 1)]
    places = np.searchsorted(values, ends, side="right")
    counts = np.diff(places, prepend=0).tolist()
    bars = list(zip(ends, counts, strict=True))
    return bars if places[-1] == len(values) else [*bars, (int(values[-1]), len(values) - int(places[-1]))]
