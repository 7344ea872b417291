"""From conversations to the tokens a model reads: the same ones in training and when it is asked.

The text between two control tokens is tokenised by itself, as every fast tokenizer does, so that a piece
met before need not be tokenised again.  Words that spell a control token stay words: they travel through the
template as stand-ins, and are tokenised with the control tokens switched off."""

from __future__ import annotations

import re
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankfold.errors import DataError
from rankfold.models.messages.template import Conversation, TemplateMessage, render_all

__all__ = ["Piece", "PromptEncoder", "TemplateMessage", "prompt_encoder"]

# A stand-in is spelt in Unicode's noncharacters, which no text may hold: one that opens, three digits.
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
STAND_INS = re.compile("\ufdd0[\ufdd1-\ufdef]{3}")
FIRST_DIGIT, DIGITS = 0xFDD1, 31
BLANK = str.maketrans("", "", " \t\n\r")
KEPT_PIECES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenised by itself; in a ``literal`` one nothing is a control token."""

    text: str
    literal: bool = False


class PromptEncoder:
    """Renders and tokenises for one tokenizer.  Get it from ``prompt_encoder``.

    ``joins``: the tokenizer writes a piece differently when other text stands before it (it puts a space at
    the beginning of a text, say), so that texts can only be tokenised whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control = {token.content: number for number, token in added.items() if token.special}
        self.control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.control_ids = frozenset(self.control.values())
        # A token that swallows the white space beside it must be tokenised together with it.
        greedy = {t.content for t in added.values() if t.lstrip or t.rstrip or t.normalized}
        self.spelling = any_of(self.control)
        self.borders = any_of(self.control.keys() - greedy)
        self.stand_ins = {text: _stand_in(place) for place, text in enumerate(self.control)}
        self.restored = {stand_in: text for text, stand_in in self.stand_ins.items()}
        self.known: dict[Piece, list[int] | DataError] = {}
        self.joins = not self._pieces_are_independent()
        whole, bare = (self._numbers(["x"], False, add_special_tokens=add)[0] for add in (True, False))
        self.opening = whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]

    def shield(self, conversation: Conversation) -> Conversation:
        """The conversation with stand-ins in place of words that spell control tokens."""
        content = [conversation.messages, conversation.tools]
        if any(map(NONCHARACTERS.search, _texts(content))):
            raise DataError("the text holds characters of U+FDD0 to U+FDEF, which are none; remove them")
        if not any(map(self.spelling.search, _texts(content))):
            return conversation
        messages, tools = _map_texts(
            content, lambda text: self.spelling.sub(lambda found: self.stand_ins[found.group()], text)
        )
        return replace(conversation, messages=messages, tools=tools)

    def prompt_ids(
        self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """The tokens after which the assistant speaks.  Raises DataError or ModelError."""
        asked = self.shield(Conversation(messages, [(len(messages), True)], tools))
        [rendered] = render_all(self.tokenizer, [asked])
        if isinstance(rendered, DataError):
            raise rendered
        return self.ids_now(self.cut(rendered[0].text))

    def text_ids(self, text: str) -> list[int]:
        """The tokens of running text, with what the tokenizer puts before a text and nothing after it."""
        return self.opening + self.ids_now([self.text_piece(text)])

    def text_piece(self, text: str) -> Piece:
        return Piece(text, literal=bool(self.spelling.search(text)))

    def cut(self, text: str) -> list[Piece]:
        """A rendered text, or the part of it after a prompt, in pieces.

        Raises DataError if words spell control tokens and the tokenizer has no way to write them."""
        if self.joins:
            if NONCHARACTERS.search(text):
                raise DataError(
                    f"the text spells control tokens of this model ({', '.join(self.spelt(text))}), and its "
                    "tokenizer cannot write them as words"
                )
            return [Piece(text)]
        pieces = [Piece(part) for part in self.borders.split(text) if part]
        return [Piece(self.restore(p.text), True) if NONCHARACTERS.search(p.text) else p for p in pieces]

    def restore(self, text: str) -> str:
        """``text`` with the words that the stand-ins stand for."""
        restored = STAND_INS.sub(lambda found: self.restored[found.group()], text)
        if NONCHARACTERS.search(restored):
            raise DataError(
                "the text spells control tokens of this model, and the chat template changes them"
            )
        return restored

    def spelt(self, text: str) -> list[str]:
        return sorted({self.restored[one] for one in STAND_INS.findall(text)})

    def ids_now(self, pieces: list[Piece]) -> list[int]:
        self.learn(pieces)
        return self.ids(pieces)

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Tokenise, in two calls, the pieces that are not known yet."""
        if len(self.known) > KEPT_PIECES:
            self.known.clear()
        new = dict.fromkeys(piece for piece in pieces if piece not in self.known)
        for literal in (False, True):
            texts = [piece.text for piece in new if piece.literal == literal]
            if texts:
                self.known |= zip(
                    [Piece(t, literal) for t in texts], self._numbers(texts, literal), strict=True
                )
                self._check([Piece(text, literal) for text in texts])

    def ids(self, pieces: Iterable[Piece]) -> list[int]:
        """The tokens of pieces that were learnt.  Raises DataError for one that cannot be written."""
        ids: list[int] = []
        for piece in pieces:
            known = self.known[piece]
            if isinstance(known, DataError):
                raise known
            ids += known
        return ids

    def _numbers(self, texts: list[str], literal: bool, add_special_tokens: bool = False) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            split_special_tokens=literal,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return found

    def _read(self, rows: list[Any]) -> list[str]:
        """The text of each row of tokens, by the fast tokenizer's own hand where there is one."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:
            return list(fast.decode_batch(rows, skip_special_tokens=False))
        return list(self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False))

    def _check(self, pieces: list[Piece]) -> None:
        """Put an error in the place of what does not read as its text: some vocabularies lack bytes and
        drop them without a word, and not every tokenizer can switch control tokens off."""
        decoded = self._read([self.known[piece] for piece in pieces])
        for piece, text in zip(pieces, decoded, strict=True):
            ids = self.known[piece]
            assert not isinstance(ids, DataError)
            if piece.literal and not self.control_ids.isdisjoint(ids):
                spelt = ", ".join(sorted(set(self.spelling.findall(piece.text))))
                self.known[piece] = DataError(
                    f"the text spells control tokens of this model ({spelt}), and its tokenizer cannot "
                    "write them as words"
                )
            elif text != piece.text and not same_letters(text, piece.text):
                lost = ", ".join(map(ascii, self._lost(piece.text)))
                self.known[piece] = DataError(f"this model's vocabulary cannot spell: {lost}")

    def _lost(self, text: str) -> list[str]:
        characters = sorted(set(text))
        decoded = self._read(self._numbers(characters, True))
        pairs = zip(characters, decoded, strict=True)
        return [one for one, read in pairs if not same_letters(one, read)] or [text[:40]]

    def _pieces_are_independent(self) -> bool:
        control = next(iter(self.borders.findall("".join(self.control))), "")
        pieces = ["x\n", "y z", control, " w", control, "v"]
        apart = self._numbers([piece for piece in pieces if piece], False)
        return self._numbers(["".join(pieces)], False)[0] == [token for ids in apart for token in ids]


def _stand_in(place: int) -> str:
    digits = (place // DIGITS**2, place // DIGITS % DIGITS, place % DIGITS)
    return "\ufdd0" + "".join(chr(FIRST_DIGIT + digit) for digit in digits)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern, in one group, for the longest of ``texts`` that stands at a place; none matches nothing."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def same_letters(one: str, other: str) -> bool:
    """Equal but for white space and Unicode composition, which some tokenizers normalise."""
    first, second = (unicodedata.normalize("NFKC", text).translate(BLANK) for text in (one, other))
    return first == second


def squeeze(text: str) -> str:
    """``text`` without white space, which templates trim and add."""
    return "".join(text.split())


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


_ENCODERS: weakref.WeakKeyDictionary[Any, tuple[Any, PromptEncoder]] = weakref.WeakKeyDictionary()


def prompt_encoder(tokenizer: Any) -> PromptEncoder:
    """The encoder of this tokenizer, made once as long as no token is added to it."""
    state = (len(tokenizer), tuple(tokenizer.all_special_tokens))
    known = _ENCODERS.get(tokenizer)
    if known is None or known[0] != state:
        known = _ENCODERS[tokenizer] = (state, PromptEncoder(tokenizer))
    return known[1]
