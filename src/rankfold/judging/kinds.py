"""What kind of answer rows want, seen from the answers themselves, and what is measured then."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rankfold.judging.scores import json_fields, normal, read_json, words

NEARLY_ALL = 0.9
MOST_LABELS = 200
LABEL_WORDS = 8
FEW_LABELS = 10  # numbers that are no more than these are labels, such as stars
ROWS_A_LABEL = 2  # on average, at least
SHORT_WORDS = 10
ENDING = re.compile(r"\d[^\w]*([^\W\d_]{1,12}\W?)?$")  # a number, a unit and a mark
LABEL_METRICS = ("accuracy", "macro_f1", "choice", "choice_macro_f1")
OF_KIND = {
    "labels": LABEL_METRICS,
    "choices": ("choice", "exact"),
    "numbers": ("number",),
    "json": ("json_valid", "json_fields"),
    "short": ("exact", "f1"),
    "words": ("rouge_l", "chrf", "f1"),
    "text": (),
}


@dataclass(frozen=True)
class Kind:
    """What answers are, why it is thought so, and the labels if they are that."""

    name: str
    reason: str
    labels: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        return OF_KIND[self.name]


def kind_of(wanted: Sequence[str]) -> Kind:
    """The kind of the answers in ``wanted``, the first that fits."""
    count = len(wanted)
    if sum(map(_is_json, wanted)) >= NEARLY_ALL * count:
        return Kind("json", "the answers are JSON")
    labels = labels_of(wanted)
    longest = max(len(words(text)) for text in labels)
    is_labelled = 1 < len(labels) <= min(MOST_LABELS, count // ROWS_A_LABEL) and longest <= LABEL_WORDS
    numbers = sum(map(_ends_in_number, wanted))
    are_names = len(labels) <= FEW_LABELS or sum(map(_has_letters, labels)) >= NEARLY_ALL * len(labels)
    if numbers >= NEARLY_ALL * count and not (is_labelled and are_names):
        return Kind("numbers", f"{numbers:,} of {count:,} answers end in a number")
    if is_labelled:
        return Kind("labels", f"the answers are {len(labels)} labels", labels)
    middle = median(len(words(text)) for text in wanted)
    if middle <= SHORT_WORDS:
        return Kind("short", f"half of the answers have at most {middle:g} words")
    return Kind("words", f"answers in words, {middle:g} of them in the middle")


def labels_of(wanted: Sequence[str]) -> tuple[str, ...]:
    """Each answer once, as it is written most often, in the order of how often it comes."""
    spelt: dict[str, Counter[str]] = {}
    for text in wanted:
        spelt.setdefault(normal(text), Counter())[text] += 1
    by_count = sorted(spelt.items(), key=lambda item: (-item[1].total(), item[0]))
    return tuple(counts.most_common(1)[0][0] for _, counts in by_count)


def _is_json(text: str) -> bool:
    try:
        return isinstance(read_json(text), dict | list) and json_fields(text, text) == 1
    except ValueError:
        return False


def _ends_in_number(text: str) -> bool:
    """Whether ``text`` ends in a number, perhaps with a unit behind it."""
    return ENDING.search(text.rstrip()) is not None


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))
