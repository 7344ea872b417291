"""How good an answer is beside the one that was wanted: each a function of both, from 0 to 1."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from rankfold.errors import ConfigError

Score = Callable[[str, str], float]

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
FINAL = "####"  # what GSM8K writes before the number that counts
FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
ARTICLES = {"a", "an", "the"}
# A word, or a character of a script that is written without spaces.
WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿가-힯฀-๿]|[^\W_]+")


def normal(text: str) -> str:
    """``text`` as exact match compares it: one width and case of letters, single spaces, and nothing but
    words at its ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .,;:!?\"'`*。，；：！？、“”‘’「」")


def exact(answer: str, wanted: str) -> float:
    return float(normal(answer) == normal(wanted))


def last_number(text: str) -> Decimal | None:
    """The last number of ``text``, or of what follows its last ``####``; None if there is none."""
    found = NUMBER.findall(unicodedata.normalize("NFKC", text).rpartition(FINAL)[2].replace("−", "-"))
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def number(answer: str, wanted: str) -> float:
    """Whether the last numbers are equal, as GSM8K is judged (Cobbe et al. 2021, arXiv 2110.14168)."""
    given = last_number(answer)
    return float(given is not None and given == last_number(wanted))


def words(text: str) -> list[str]:
    """The words of ``text`` in one case, without articles; of Chinese, Japanese, Korean and Thai the
    characters."""
    return [word for word in WORD.findall(normal(text)) if word not in ARTICLES]


def f1(answer: str, wanted: str) -> float:
    """The F1 of the words that both have (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1)."""
    ours, theirs = Counter(words(answer)), Counter(words(wanted))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


class _Words:
    """The tokenizer of rouge-score, whose own one drops every letter but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.casefold())


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("rouge_l needs the package rouge-score; pip install 'rankfold[eval]'") from error
    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by rouge-score."""
    return float(_rouge().score(wanted, answer)["rougeL"].fmeasure)


@cache
def _chrf() -> Any:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ConfigError("chrf needs the package sacrebleu; pip install 'rankfold[eval]'") from error
    return CHRF()


def chrf(answer: str, wanted: str) -> float:
    """The F-score of character n-grams (Popović 2015), by sacrebleu."""
    return float(_chrf().sentence_score(answer, [wanted]).score) / 100


def read_json(text: str) -> Any:
    """The value that ``text`` is, alone or as its only fenced block.  Raises ValueError."""
    blocks = FENCE.findall(text)
    try:
        return json.loads(blocks[0] if len(blocks) == 1 else text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_valid(answer: str, _: str) -> float:
    try:
        read_json(answer)
    except ValueError:
        return 0.0
    return 1.0


def json_fields(answer: str, wanted: str) -> float:
    """The F1 of the fields: each is its path and the value at its end; 0 if the answer is no JSON."""
    try:
        ours, theirs = (Counter(_leaves(read_json(text))) for text in (answer, wanted))
    except ValueError:
        return 0.0
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The fields of ``value``; an empty object or list is one itself, and the place in a list counts."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield from _leaves(item, f"{path}[{place}]")
    else:
        plain = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        yield path, json.dumps(plain)


def by_pattern(pattern: re.Pattern[str]) -> Score:
    """Whether the last thing that ``pattern`` finds (its first group, if it has one) is the same in both."""

    def score(answer: str, wanted: str) -> float:
        ours, theirs = found_by(pattern, answer), found_by(pattern, wanted)
        return float(ours is not None and ours == theirs)

    return score


def found_by(pattern: re.Pattern[str], text: str) -> str | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 - the last one is used
        pass
    if last is None:
        return None
    return normal(last[1] or "") if pattern.groups else normal(last[0])


SCORES: Mapping[str, Score] = {
    "exact": exact,
    "number": number,
    "f1": f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "json_valid": json_valid,
    "json_fields": json_fields,
}
