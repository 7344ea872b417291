"""An answer shown while it comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's tokens of one byte
CUT_CHARACTER = "\ufffd"  # what is decoded from a character whose last bytes are not there


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """An answer's text: without control tokens, without a last character that was cut, without white space
    around it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(CUT_CHARACTER).strip()


class TextStream:
    """transformers' streamer that ``write``s an answer piece by piece; all pieces together are ``decoded``.

    All tokens so far are decoded anew with each: what a token says may hang on those before it.  Of tokens
    that stand for one byte nothing is shown until the next other word: what they say together is not known
    before."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.unsaid = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        word = str(self.tokenizer.convert_ids_to_tokens(self.ids[-1]))
        if not BYTE.fullmatch(word) and self.ids[-1] not in self.unsaid:
            self._show()

    def end(self) -> None:
        self._show()

    def _show(self) -> None:
        text = decoded(self.tokenizer, self.ids)
        if text.startswith(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text
