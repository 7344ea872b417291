"""An answer's text: at its end, and while it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's tokens of one byte
CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes are not there


def decoded(tokenizer: Any, ids: list[int], stops: Sequence[str] = (), verbatim: bool = False) -> str:
    """An answer's text up to the first of ``stops``: without control tokens, without a last character that
    was cut, and, unless it is wanted ``verbatim``, without white space around it."""
    text = words(tokenizer, ids)
    return _tidy(text[: stop_place(text, stops)], verbatim)


def _tidy(text: str, verbatim: bool) -> str:
    text = text.rstrip(CUT_CHARACTER)
    return text if verbatim else text.strip()


def words(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of ``stops`` begins in ``text``; None if none is there."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class TextStream:
    """``write``s an answer piece by piece; all pieces together are ``decoded``.

    All tokens so far are decoded anew with each: what a token says may hang on those before it.  Of tokens
    that stand for one byte nothing is shown until the next other word: what they say together is not known
    before.  Nor is what one of ``stops`` may begin with."""

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object],
        stops: Sequence[str] = (),
        verbatim: bool = False,
    ) -> None:
        self.tokenizer, self.write, self.stops, self.verbatim = tokenizer, write, stops, verbatim
        self.unsaid = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.shown = ""

    def put(self, ids: list[int]) -> None:
        """``ids``: the whole answer so far."""
        word = str(self.tokenizer.convert_ids_to_tokens(ids[-1]))
        if not BYTE.fullmatch(word) and ids[-1] not in self.unsaid:
            text = words(self.tokenizer, ids)
            text = text[: stop_place(text, self.stops)]
            self._show(_tidy(text[: len(text) - self._may_be_a_stop(text)], self.verbatim))

    def end(self, ids: list[int]) -> None:
        self._show(decoded(self.tokenizer, ids, self.stops, self.verbatim))

    def _may_be_a_stop(self, text: str) -> int:
        """How many of the last characters of ``text`` a stop may begin with."""
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def _show(self, text: str) -> None:
        if text.startswith(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text
