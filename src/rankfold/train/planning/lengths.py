"""How long the rows of a run are in tokens: counted, or estimated where no tokenizer is at hand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankfold.data.shapes.example import Example, Message
from rankfold.errors import ModelError
from rankfold.models.base.base import Base
from rankfold.models.base.image_text import has_system_prompt, image_cutter
from rankfold.models.base.processors import cut_at_most
from rankfold.models.base.text_side import longest_input
from rankfold.models.messages.images import ImageReader, size_of
from rankfold.train.asked.recipe import Recipe
from rankfold.train.planning.rows import Rows, Text, encode_rows

ASCII_CHARS = 4  # of a token of English or code; any other character is counted as a token of its own
TURN_TOKENS = 5  # that a template adds to a message: its role, two marks and line feeds
SYSTEM_TOKENS = 60  # of InternVL 2.5's own system prompt
IMAGE_MARKS = 2  # before and after an image's tokens
ESTIMATE = (
    f"estimated, as there is no tokenizer: {ASCII_CHARS} ASCII characters or one other character a token, "
    f"and {TURN_TOKENS} tokens a message"
)


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """Tokens of each training row and of all held-out rows; ``trained``, ``images`` and ``tiles`` are those
    of the training rows, ``most_tiles`` of one of them.  ``how`` says how they were found."""

    train: list[int]
    held_out: int
    trained: int
    images: int
    tiles: int
    most_tiles: int
    how: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class TileSize:
    """The tokens of a tile, and the most tiles that an image is cut into, the thumbnail among them."""

    tokens: int
    most: int


def tile_size(base: Base, recipe: Recipe) -> TileSize | None:
    """Of a model that cuts images into tiles that can be counted (InternVL); None for any other."""
    tokens, cutter = getattr(base.model.config, "image_seq_length", None), _cutter(base, recipe)
    if tokens is None or cutter is None:
        return None
    most = int(cutter.max_patches) if cutter.crop_to_patches else 1
    return TileSize(tokens=tokens, most=most + 1 if most > 1 else 1)


def row_lengths(recipe: Recipe, rows: Rows, base: Base) -> RowLengths:
    """Raises DataError for rows that cannot be encoded, ModelError for images without a processor."""
    if base.tokenizer is None:
        return _estimated(recipe, rows, base)
    longest = longest_input(base.model.config)
    text = Text(tokenizer=base.tokenizer, processor=base.processor, longest=longest)
    encoded, tile = encode_rows(recipe, rows, text), tile_size(base, recipe)
    tiles = [_tiles(row.input_ids, encoded.reader, tile) for row in encoded.train]
    return RowLengths(
        train=[len(row) for row in encoded.train],
        held_out=sum(map(len, encoded.held_out)),
        trained=sum(row.trained_tokens for row in encoded.train),
        images=sum(len(row.images) for row in encoded.train),
        tiles=sum(tiles),
        most_tiles=max(tiles),
        how="counted with the model's own tokenizer and template",
        notes=encoded.notes,
    )


def _tiles(ids: list[int], reader: ImageReader | None, tile: TileSize | None) -> int:
    if reader is None or tile is None:
        return 0
    return sum(token in reader.image_ids for token in ids) // tile.tokens


def _estimated(recipe: Recipe, rows: Rows, base: Base) -> RowLengths:
    tile, cutter = tile_size(base, recipe), _cutter(base, recipe)
    if rows.images and tile is None:
        raise ModelError(
            f"{base.source.name}: how many tokens its images take is for its processor to say, and there is "
            "none beside the config; put the processor's files there"
        )
    tiles = [sum(_tiles_of(m, cutter) for m in example.messages) for example in rows.train]
    opening = SYSTEM_TOKENS if has_system_prompt(base.source) else 0
    words = [_tokens(example, opening) for example in rows.train]
    images = [sum(len(m.images) for m in example.messages) for example in rows.train]
    per_tile = tile.tokens if tile is not None else 0
    lengths = [
        word + per_tile * tile_count + IMAGE_MARKS * image_count
        for word, tile_count, image_count in zip(words, tiles, images, strict=True)
    ]
    longest = recipe.max_length or longest_input(base.model.config) or math.inf
    kept = [place for place, length in enumerate(lengths) if length <= longest]
    over = len(lengths) - len(kept)
    return RowLengths(
        train=[lengths[place] for place in kept],
        held_out=sum(_tokens(example, opening) for example in rows.held_out),
        trained=sum(_trained(rows.train[place], recipe) for place in kept),
        images=sum(images[place] for place in kept),
        tiles=sum(tiles[place] for place in kept),
        most_tiles=max((tiles[place] for place in kept), default=0),
        how=ESTIMATE,
        notes=[f"{over:,} rows look longer than {longest:,} tokens and are left out"] if over else [],
    )


def _cutter(base: Base, recipe: Recipe) -> Any:
    """InternVL's image processor, that of the folder or the one that the config asks for."""
    cutter = image_cutter(base.source, base.model.config, base.processor)
    if cutter is not None and recipe.image_tiles is not None:
        cut_at_most(cutter, recipe.image_tiles)
    return cutter


def _tiles_of(message: Message, cutter: Any) -> int:
    sizes = (size_of(image.path) for image in message.images)
    return sum(int(cutter.get_number_of_image_patches(height, width)) for width, height in sizes)


def _tokens(example: Example, opening: int) -> int:
    if not example.messages:
        return text_tokens(example.text)
    has_system = example.messages[0].role == "system"
    return text_tokens_of(example.messages) + (0 if has_system else opening)


def text_tokens_of(messages: Iterable[Message]) -> int:
    return sum(text_tokens(message.text) + TURN_TOKENS for message in messages)


def text_tokens(text: str) -> int:
    """About as many tokens as a large vocabulary makes of ``text``."""
    ascii_chars = sum(character.isascii() for character in text)
    return math.ceil(ascii_chars / ASCII_CHARS) + len(text) - ascii_chars


def _trained(example: Example, recipe: Recipe) -> int:
    if not example.messages or recipe.train_on == "all":
        return _tokens(example, 0)
    answers = [message for message in example.messages if message.role == "assistant"]
    return sum(text_tokens(m.text) + 1 for m in (answers[-1:] if recipe.train_on == "last" else answers))
