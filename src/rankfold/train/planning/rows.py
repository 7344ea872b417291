"""The first two steps of a plan: how the base reads, and the rows as it reads them.

Nothing here needs torch, so that a fault in the rows is told before anything that takes time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.data.check.balance import Lengths, summarise
from rankfold.data.check.measure import texts_of
from rankfold.data.order.split import near_leaks, split_held_out, without_leaks
from rankfold.data.shapes.convert import refuse_untrainable
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.example_store import Joined
from rankfold.data.shapes.sources import Mixture, Source, read_examples, sources_of
from rankfold.data.tokens.cache import CachedRows, encode_cached, encoding_marks, lengths_of
from rankfold.data.tokens.encode import EncodedRow, Encoding, encode_all, too_long
from rankfold.errors import ConfigError, bullet_list
from rankfold.judging.general_rows import GeneralRow, general_rows
from rankfold.models.base.processors import set_most_tiles
from rankfold.models.base.text_side import load_text
from rankfold.models.base.tokens import with_tokens
from rankfold.models.choices import PromptStyle
from rankfold.models.messages.images import ImageReader, image_reader
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.train.asked.recipe import Recipe
from rankfold.train.planning.kept_rows import Kept, keep, kept_name, read_kept

if TYPE_CHECKING:
    from rankfold.lora.files.adapter_metadata import AdapterMetadata

SHOWN_WORDS = 5  # of special tokens that rows spell
NAMED_ROWS = 10  # of those that are too long


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a base reads and writes: its tokenizer, its processor if it sees images, and the longest input that
    it was made for; ``started`` are the facts of the adapter that a run starts from, if it names one."""

    tokenizer: Any
    processor: Any = None
    longest: int | None = None
    started: AdapterMetadata | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The data of a run: examples to train and judge on, whether any has images, and what was noticed."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    images: bool
    prompt_style: PromptStyle
    shape: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Training and held-out rows as tokens, what was cut off, and what was noticed."""

    train: Sequence[EncodedRow]
    held_out: list[EncodedRow]
    reader: ImageReader | None
    cut: Lengths
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The rows of a run, and its base as far as they need it."""

    text: Text
    rows: Rows
    encoded: Encoded
    general: list[GeneralRow]


def prepare(recipe: Recipe) -> Prepared:
    """Read the rows and make tokens of them, unless that was done before.

    Raises DataError, ModelError, ConfigError or AdapterError."""
    general = general_rows(recipe.general)
    _refuse_without_general(recipe, general)
    text = read_text(recipe)
    may_keep = text.processor is None and not recipe.rehearse
    name = kept_name(recipe, text.tokenizer) if may_keep else None
    if name is not None and (kept := read_kept(name)) is not None:
        return _prepared(recipe, text, kept, general)
    rows = read_data(recipe, text.processor is not None)
    rows, general = rehearsing(recipe, rows, general)
    spelt = spelt_tokens(Joined(rows.train, rows.held_out), text.tokenizer)
    rows = replace(rows, notes=[*rows.notes, *spelt])
    encoded = encode_rows(recipe, rows, text)
    if name is not None and isinstance(encoded.train, CachedRows):
        facts = {
            "style": rows.prompt_style,
            "shape": rows.shape,
            "rows": rows.notes,
            "encoded": encoded.notes,
        }
        held_out = list(rows.held_out)
        keep(name, Kept(train=encoded.train, held_out=held_out, cut=encoded.cut, facts=facts))
    return Prepared(text=text, rows=rows, encoded=encoded, general=general)


def _refuse_without_general(recipe: Recipe, general: Sequence[GeneralRow]) -> None:
    if recipe.forget_limit is not None and not general:
        raise ConfigError("forget_limit: it is told by general text, and general is none")
    if recipe.rehearse and (recipe.general is None or not general):
        raise ConfigError(
            "rehearse: name the rows with general, a file; those that come along are few, and tell what was "
            "forgotten"
        )


def rehearsing(recipe: Recipe, rows: Rows, general: Sequence[GeneralRow]) -> tuple[Rows, list[GeneralRow]]:
    """``rows`` with some of ``general`` among those to train on, as ``recipe`` asks, and the others, which
    tell what was forgotten: half of them at least.  Raises ConfigError if none are of the rows' kind."""
    if not recipe.rehearse:
        return rows, list(general)
    fitting = [row for row in general if (not row.example.messages) == (rows.prompt_style == "plain")]
    wanted = round(recipe.rehearse * len(rows.train))
    count = min(wanted, len(fitting) // 2)
    if not count:
        few = f"{recipe.general} has no two {rows.prompt_style} rows, as the data has"
        raise ConfigError(f"rehearse: {few}; name a file of such rows as general")
    drawn = fitting[:: len(fitting) // count][:count]
    taken = {row.example.origin for row in drawn}
    fewer = f", not {wanted:,}: half of its rows tell what was forgotten" if count < wanted else ""
    told = f"{count:,} rows of {recipe.general} are trained on too{fewer}"
    train = Joined(rows.train, [row.example for row in drawn])
    left = [row for row in general if row.example.origin not in taken]
    return replace(rows, train=train, notes=[*rows.notes, told]), left


def _prepared(recipe: Recipe, text: Text, kept: Kept, general: list[GeneralRow]) -> Prepared:
    """What was prepared before, but for the training rows as they were written, which nobody needs again."""
    facts = kept.facts
    style, shape, notes = facts["style"], facts["shape"], facts["rows"]
    rows = Rows(train=[], held_out=kept.held_out, images=False, prompt_style=style, shape=shape, notes=notes)
    most = recipe.max_length or text.longest or sys.maxsize
    judged, _ = encode_all(kept.held_out, text.tokenizer, most, recipe.train_on)
    held_out, _ = _cut(judged, kept.cut.cut)
    encoded = Encoded(
        train=kept.train,
        held_out=list(held_out or judged),
        reader=None,
        cut=kept.cut,
        notes=facts["encoded"],
    )
    return Prepared(text=text, rows=rows, encoded=encoded, general=general)


def spelt_tokens(examples: Iterable[Example], tokenizer: Any) -> list[str]:
    """A note on ``examples`` that spell special tokens of the model, which are learnt as words."""
    spelling = prompt_encoder(tokenizer).spelling
    found, words = 0, Counter[str]()
    for example in examples:
        spelt = [word for text in texts_of(example) for word in spelling.findall(text)]
        words.update(spelt)
        found += bool(spelt)
    if not found:
        return []
    named = ", ".join(word for word, _ in words.most_common(SHOWN_WORDS))
    more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
    return [
        f"{found:,} rows spell special tokens of the model ({named}{more}), which are learnt as words; "
        "name under as_tokens those that are to be tokens"
    ]


def read_text(recipe: Recipe) -> Text:
    """Raises ModelError, AdapterError or ConfigError."""
    tokenizer, processor, longest = load_text(recipe.model)
    if recipe.adapter is not None:
        from rankfold.train.planning.start import text_of_start

        return text_of_start(recipe, Text(tokenizer=tokenizer, processor=processor, longest=longest))
    tokenizer = with_tokens(tokenizer, recipe.eos_token, recipe.as_tokens)
    if processor is not None:
        processor.tokenizer = tokenizer
    return Text(tokenizer=tokenizer, processor=processor, longest=longest)


def read_data(recipe: Recipe, sees_images: bool) -> Rows:
    """Read and split the rows.  Raises DataError, also for images that the model does not see."""
    data = _read(recipe, recipe.data)
    refuse_untrainable(data.first.values(), sees_images=sees_images)
    notes, images = _noticed(data), "pictures" in data.first
    if recipe.held_out is None or isinstance(recipe.held_out, float):
        train, held_out = split_held_out(data.examples, recipe.held_out)
        dropped = len(data.examples) - len(train) - len(held_out)
        if dropped:
            notes.append(f"{dropped} training rows left out: copies or near copies of held-out rows")
    else:
        other = _read(recipe, recipe.held_out)
        refuse_untrainable(other.first.values(), sees_images=sees_images)
        images = images or "pictures" in other.first
        notes += _noticed(other)
        held_out = other.examples
        train, leaked = without_leaks(data.examples, held_out)
        if leaked:
            notes.append(
                f"{len(leaked)} training rows left out: they are in the held-out file too ({leaked[0]} ...)"
            )
        if near := near_leaks(train, held_out):
            notes.append(
                f"{len(near)} training rows are near copies of rows in the held-out file ({near[0]} ...); "
                "they stay, and make the tuned model look better than it is"
            )
        if other.prompt_style != data.prompt_style:
            notes.append(f"the held-out rows are {other.prompt_style}, the training rows {data.prompt_style}")
    return Rows(
        train=train,
        held_out=held_out,
        images=images,
        prompt_style=data.prompt_style,
        shape=data.description,
        notes=notes,
    )


def _read(recipe: Recipe, data: str | Path | list[Source]) -> Mixture:
    sources = sources_of(data, recipe.shape, recipe.encoding, recipe.leave_out)
    return read_examples(sources, recipe.seed, recipe.skip_bad)


def _noticed(data: Mixture) -> list[str]:
    """What was read otherwise than it is written, and the bad rows that the recipe allows for, the first few
    by name."""
    if not data.bad:
        return [*data.notes]
    named = [f"{row.origin}: {row.problem}" for row in data.bad]
    return [*data.notes, bullet_list(f"{len(named)} bad rows left out:", named, shown=3)]


def encode_rows(recipe: Recipe, rows: Rows, text: Text) -> Encoded:
    """Training and held-out rows as tokens, without those that are too long for the model or for
    ``recipe``; where it is silent, they are cut off where ``rankfold check`` would cut the training rows.

    Raises DataError, ConfigError, or ModelError."""
    reader, longest = _reader(recipe, rows, text), text.longest
    most, train_on = recipe.max_length or longest or sys.maxsize, recipe.train_on
    encoding = Encoding(rows.train, text.tokenizer, most, train_on, reader)
    marks = encoding_marks(text.tokenizer, max_length=most, train_on=train_on)
    train, over = encode_cached(encoding, rows.train, marks)
    judged, more_over = encode_all(rows.held_out, text.tokenizer, most, train_on, reader)
    lengths = summarise(lengths_of(train), "tokens", longest, recipe.max_length)
    (train, cut), (held_out, more_cut) = (_cut(part, lengths.cut) for part in (train, judged))
    over = [*over, *more_over, *cut, *(more_cut if held_out else [])]
    notes = [f"left out, too long: {row}" for row in over[:NAMED_ROWS]]
    if len(over) > NAMED_ROWS:
        notes.append(f"and {len(over) - NAMED_ROWS:,} more rows that are too long")
    if not held_out:
        notes.append(f"every held-out row is over {lengths.cut:,} tokens, so they stay")
    return Encoded(train=train, held_out=list(held_out or judged), reader=reader, cut=lengths, notes=notes)


def _cut(rows: Sequence[EncodedRow], most: int) -> tuple[Sequence[EncodedRow], list[str]]:
    """The rows of at most ``most`` tokens, and the names of the others."""
    over = [place for place, length in enumerate(lengths_of(rows)) if length > most]
    named = [too_long(rows[place], most) for place in over]
    if isinstance(rows, CachedRows):
        return rows.up_to(most), named
    return [row for row in rows if len(row) <= most], named


def _reader(recipe: Recipe, rows: Rows, text: Text) -> ImageReader | None:
    """What reads the images of the rows, if any has some.  Raises ConfigError or ModelError for
    ``image_tiles`` of a model that does not count in them."""
    if recipe.image_tiles is not None and text.processor is None:
        raise ConfigError(f"image_tiles: {recipe.model} does not see images")
    if recipe.image_tiles is not None:
        set_most_tiles(text.processor, recipe.image_tiles)
    return image_reader(text.processor) if rows.images else None
