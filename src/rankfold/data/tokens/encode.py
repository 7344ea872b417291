"""From examples to token ids and labels: exactly the assistants' words and their stop token are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

from rankfold.data.shapes.example import Example
from rankfold.data.tokens.mask import TrainOn, Turn, find_turns, trained_places
from rankfold.errors import DataError, bullet_list
from rankfold.models.messages.images import ImageReader, SizedImage
from rankfold.models.messages.prompt import Piece, PromptEncoder, prompt_encoder

IGNORE = -100  # the label of an untrained token, as in torch.nn.functional.cross_entropy
REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")
EXAMPLES_AT_ONCE = 256  # rendered and tokenised together


@dataclass(frozen=True)
class EncodedRow:
    """``input_ids`` and ``labels`` of one row, of equal length; a label is the token itself or IGNORE.

    ``images`` are those whose tokens stand in it, in their order; their pixels are read when rows are
    put together (see ``PaddedImages``).  ``weights``: how much each token's loss counts; None is 1 each."""

    origin: str
    input_ids: list[int]
    labels: list[int]
    images: tuple[SizedImage, ...] = ()
    weights: list[float] | None = None

    @property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)

    @property
    def weight(self) -> float:
        """What its trained tokens count, all together."""
        if self.weights is None:
            return float(self.trained_tokens)
        return sum(w for w, label in zip(self.weights, self.labels, strict=True) if label != IGNORE)

    def __len__(self) -> int:
        return len(self.input_ids)


def marked_pieces(row: EncodedRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text as the model sees it, cut into (text, trained) pieces: the proof of the mask."""
    pieces = []
    for trained, group in groupby(zip(row.input_ids, row.labels, strict=True), lambda p: p[1] != IGNORE):
        ids = [token for token, _ in group]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        pieces.append((_folded(text) if row.images else text, trained))
    return pieces


def _folded(text: str) -> str:
    """``text`` with an image's many equal tokens written once, and how many they are."""
    return REPEATED.sub(lambda found: f"{found[1]} x {len(found[0]) // len(found[1]):,} ", text)


@dataclass
class Encoding:
    """The rows of ``examples`` one after another, whenever it is gone through; ``over`` names those that were
    left out because they exceed ``max_length`` tokens.  ``reader`` is that of a model that sees images.

    Raises DataError at the end, listing every row that cannot be encoded, or if none is left."""

    examples: Iterable[Example]
    tokenizer: Any
    max_length: int
    train_on: TrainOn = "assistant"
    reader: ImageReader | None = None
    over: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[EncodedRow]:
        self.over, problems, kept = [], [], 0
        for example, rows in encode_each(self.examples, self.tokenizer, self.train_on, self.reader):
            if isinstance(rows, DataError):
                problems.append(f"{example.origin}: {rows}")
                continue
            for row in rows:
                if len(row) <= self.max_length:
                    kept += 1
                    yield row
                else:
                    self.over.append(too_long(row, self.max_length))
        if problems:
            raise DataError(bullet_list(f"{len(problems)} rows cannot be encoded:", problems))
        if not kept:
            raise DataError(bullet_list("every row is too long; raise --max-length:", self.over))


def encode_all(
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    train_on: TrainOn = "assistant",
    reader: ImageReader | None = None,
) -> tuple[list[EncodedRow], list[str]]:
    """All rows of an ``Encoding``, and the names of those that were left out.  Raises DataError."""
    encoding = Encoding(examples, tokenizer, max_length, train_on, reader)
    return list(encoding), encoding.over


def too_long(row: EncodedRow, max_length: int) -> str:
    images = f" with those of its {len(row.images)} images" if row.images else ""
    return f"{row.origin} has {len(row):,} tokens{images}, more than {max_length:,}"


def encode(
    example: Example,
    tokenizer: Any,
    train_on: TrainOn = "assistant",
    reader: ImageReader | None = None,
) -> EncodedRow:
    """Encode one example.  Where it takes several rows (see ``encode_each``) this is the last and longest.

    Raises DataError if there is nothing to train, the vocabulary cannot spell the words, or the template
    changes or loses them."""
    [(_, rows)] = encode_each([example], tokenizer, train_on, reader)
    if isinstance(rows, DataError):
        raise rows
    return rows[-1]


def encode_each(
    examples: Iterable[Example],
    tokenizer: Any,
    train_on: TrainOn = "assistant",
    reader: ImageReader | None = None,
) -> Iterator[tuple[Example, list[EncodedRow] | DataError]]:
    """Each example with its rows, or with the reason why there are none.

    Messages: the assistants' words and the token that ends their turn are trained.  Running text, and
    everything with ``train_on`` "all": every token but the first, before which nothing stands to predict
    it from.  A conversation is one row as long as each prompt goes on, token for token, where the turn before
    it ended.  Where it does not, because the template drops an earlier turn's thoughts, say, another row
    begins: so each trained turn stands behind the very tokens that the model sees when it is asked.

    With a ``reader``, images in the prompts are looked at and their tokens put in; none of these is ever
    trained."""
    encoder = prompt_encoder(tokenizer)
    remaining = iter(examples)
    while chunk := list(islice(remaining, EXAMPLES_AT_ONCE)):
        chats = [example for example in chunk if example.messages]
        turns = iter(find_turns(chats, encoder, train_on, reader) if chats else [])
        found = [next(turns) if example.messages else [] for example in chunk]
        pairs = zip(chunk, found, strict=True)
        cut = [_cut(example, own, encoder, reader, train_on) for example, own in pairs]
        encoder.learn(
            piece for steps in cut if isinstance(steps, list) for step in steps for piece in step.pieces
        )
        for example, steps in zip(chunk, cut, strict=True):
            try:
                if isinstance(steps, DataError):
                    raise steps
                rows = _chat_rows if example.messages else _text_rows
                encoded = rows(example.origin, steps, encoder, train_on)
                yield example, encoded if reader is None else [_untrained(row, reader) for row in encoded]
            except DataError as error:
                yield example, error


@dataclass(frozen=True, slots=True)
class Step:
    """One trained turn in pieces: the prompt, and the prompt with the answer; the prompt's images, and how
    much each token of the answer counts."""

    prompt: list[Piece]
    whole: list[Piece]
    images: tuple[SizedImage, ...] = ()
    weight: float = 1.0

    @property
    def pieces(self) -> list[Piece]:
        return self.prompt + self.whole


def _cut(
    example: Example,
    turns: list[Turn] | DataError,
    encoder: PromptEncoder,
    reader: ImageReader | None,
    train_on: TrainOn,
) -> list[Step] | DataError:
    if isinstance(turns, DataError):
        return turns
    if not example.messages:
        return [Step([], [encoder.text_piece(example.text)])]
    try:
        steps = []
        trained = trained_places(example.messages, train_on)
        for turn, place in zip(turns, trained, strict=True):
            text, images = _with_images(turn, reader)
            prompt = encoder.cut(text)
            joined = encoder.joins  # then the answer cannot be tokenised by itself
            whole = encoder.cut(text + turn.answer) if joined else prompt + encoder.cut(turn.answer)
            steps.append(Step(prompt, whole, images, example.messages[place].weight))
        return steps
    except DataError as error:
        return error


def _with_images(turn: Turn, reader: ImageReader | None) -> tuple[str, tuple[SizedImage, ...]]:
    """A turn's prompt with the tokens of its images, and these.  Raises DataError for a broken image."""
    if reader is None:
        return turn.prompt, ()
    images = tuple(reader.look(path) for path in turn.images)
    return reader.expand(turn.prompt, images), images


def _untrained(row: EncodedRow, reader: ImageReader) -> EncodedRow:
    """The row with every token of its images untrained, whatever is trained otherwise."""
    if not row.images:
        return row
    labels = [IGNORE if label in reader.image_ids else label for label in row.labels]
    return replace(row, labels=labels)


def _text_rows(origin: str, steps: list[Step], encoder: PromptEncoder, _: TrainOn) -> list[EncodedRow]:
    ids = encoder.opening + encoder.ids(steps[0].whole)
    if encoder.tokenizer.eos_token_id is None:
        raise DataError("this tokenizer has no end-of-text token, so nothing would teach the model to stop")
    ids.append(encoder.tokenizer.eos_token_id)
    return [EncodedRow(origin, ids, [IGNORE, *ids[1:]])]


def _chat_rows(origin: str, steps: list[Step], encoder: PromptEncoder, train_on: TrainOn) -> list[EncodedRow]:
    rows = []
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    images: tuple[SizedImage, ...] = ()
    weighted = any(step.weight != 1 for step in steps)
    for step in steps:
        asked, done = encoder.ids(step.prompt), encoder.ids(step.whole)
        if done[: len(asked)] != asked:
            raise DataError(
                "the tokenizer writes the end of the prompt and the answer's beginning as one token"
            )
        if asked[: len(ids)] != ids:
            rows.append(EncodedRow(origin, ids, labels, images, weights if weighted else None))
            ids, labels, weights = [], [], []
        labels = labels + [IGNORE] * (len(asked) - len(ids)) + done[len(asked) :]
        weights = weights + [step.weight] * (len(done) - len(ids))
        ids, images = done, step.images
    if train_on == "all":
        labels = [IGNORE, *ids[1:]]
    return [*rows, EncodedRow(origin, ids, labels, images, weights if weighted else None)]
