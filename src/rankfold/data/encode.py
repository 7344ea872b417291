"""From examples to token ids and labels: exactly the assistants' words and their stop token are trained."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rankfold.data.example import Example
from rankfold.errors import DataError, bullet_list
from rankfold.models.prompt import render, require_chat_template

IGNORE = -100  # the label of an untrained token, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class EncodedRow:
    """``input_ids`` and ``labels`` of one row, of equal length; a label is the token itself or IGNORE."""

    origin: str
    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    def __len__(self) -> int:
        return len(self.input_ids)


def marked_pieces(row: EncodedRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text as the model sees it, cut into (text, trained) pieces: the proof of the mask."""
    pieces = []
    for trained, group in groupby(zip(row.input_ids, row.labels, strict=True), lambda p: p[1] != IGNORE):
        pieces.append((tokenizer.decode([token for token, _ in group]), trained))
    return pieces


def encode_all(
    examples: list[Example], tokenizer: Any, max_length: int
) -> tuple[list[EncodedRow], list[str]]:
    """Encode every example; the second list names the rows left out because they exceed ``max_length``
    tokens.  Raises DataError listing every row that cannot be encoded, or if none is left."""
    kept, too_long, problems = [], [], []
    for example in examples:
        try:
            row = encode(example, tokenizer)
        except DataError as error:
            problems.append(f"{example.origin}: {error}")
            continue
        if len(row) <= max_length:
            kept.append(row)
        else:
            too_long.append(f"{row.origin} has {len(row):,} tokens, more than {max_length:,}")
    if problems:
        raise DataError(bullet_list(f"{len(problems)} rows cannot be encoded:", problems))
    if not kept:
        raise DataError(bullet_list("every row is too long; raise --max-length:", too_long))
    return kept, too_long


def encode(example: Example, tokenizer: Any) -> EncodedRow:
    """Encode one example.  Messages: the assistants' words and the token that ends their turn are
    trained.  Running text: everything but the first token, and the end-of-text token, are trained.

    Each piece is tokenised by itself, so that the prompt's tokens are those the model will see when
    it is asked.  Raises DataError if the words spell a control token, the vocabulary cannot
    spell the words, or the template loses them."""
    contents = [message.text for message in example.messages] or [example.text]
    _refuse_control_tokens(contents, tokenizer)
    pieces = _pieces(example, tokenizer) if example.messages else [(example.text, True)]
    input_ids: list[int] = []
    labels: list[int] = []
    for text, trained in pieces:
        ids = tokenizer(text, add_special_tokens=not example.messages)["input_ids"]
        _check_spelling(text, ids, tokenizer)
        input_ids += ids
        labels += ids if trained else [IGNORE] * len(ids)
    if not example.messages:
        if input_ids[-1] != tokenizer.eos_token_id:
            input_ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        labels[0] = IGNORE  # nothing stands before the first token to predict it from
    return EncodedRow(example.origin, input_ids, labels)


def _pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, trained) pieces."""
    require_chat_template(tokenizer)
    messages = [message.for_template() for message in example.messages]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:place], for_reply=True)
        after = render(tokenizer, messages[: place + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the chat template rewrites earlier turns, so what is trained cannot be told apart"
            )
        answer = after[len(before) :]
        trained = answer.rstrip()
        _check_answer(trained, message["content"], tokenizer)
        pieces += [(before[len(done) :], False), (trained, True)]
        done = before + trained
    return pieces


def _check_answer(trained: str, content: str, tokenizer: Any) -> None:
    if content.strip() not in trained:
        raise DataError("the chat template changes the assistant's words")
    if not trained.endswith(tuple(control_tokens(tokenizer))):
        raise DataError("the chat template ends the assistant's turn without a stop token to learn")


def _check_spelling(text: str, ids: list[int], tokenizer: Any) -> None:
    """Some byte-level vocabularies lack bytes, and drop them without a word."""
    if not _same_letters(tokenizer.decode(ids), text):
        characters = ((char, tokenizer.decode(tokenizer(char)["input_ids"])) for char in set(text))
        lost = sorted(char for char, decoded in characters if not _same_letters(decoded, char))
        raise DataError(f"this model's vocabulary cannot spell: {' '.join(map(ascii, lost))}")


def _same_letters(one: str, other: str) -> bool:
    """Equal but for white space and Unicode composition, which some tokenizers normalise."""
    blank = str.maketrans("", "", " \t\n\r")
    first, second = (unicodedata.normalize("NFKC", text).translate(blank) for text in (one, other))
    return first == second


def control_tokens(tokenizer: Any) -> set[str]:
    """The texts that the tokenizer turns into control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _refuse_control_tokens(contents: list[str], tokenizer: Any) -> None:
    spelt = sorted({token for token in control_tokens(tokenizer) for text in contents if token in text})
    if spelt:
        raise DataError(f"the text spells control tokens of this model: {', '.join(spelt)}")
