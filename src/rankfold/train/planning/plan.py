"""What a run will do, worked out and timed before it starts."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankfold.data.check.balance import Lengths, summarise
from rankfold.data.order.pack import Batching, batching_of_images, choose_batching
from rankfold.data.order.split import near_leaks, split_held_out, without_leaks
from rankfold.data.shapes.convert import refuse_untrainable
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.sources import Mixture, Source, read_examples, sources_of
from rankfold.data.tokens.cache import encode_cached, encoding_marks
from rankfold.data.tokens.encode import EncodedRow, encode_all, too_long
from rankfold.data.tokens.proof import MaskProof, prove_mask
from rankfold.errors import ConfigError, bullet_list
from rankfold.lora.layers.packed import numbers_not_shown
from rankfold.models.adapters.metadata import AdapterMetadata, PromptStyle
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.base.load import Base, load_base
from rankfold.models.base.precision import Precision
from rankfold.models.base.processors import set_most_tiles
from rankfold.models.base.text_side import load_processor
from rankfold.models.messages.images import ImageReader, image_reader
from rankfold.models.messages.template import template_of
from rankfold.models.running.gates import fuse_gates
from rankfold.models.running.norms import fuse_norms
from rankfold.peft_surface import PeftModel
from rankfold.train.asked.advise import Settings, settle
from rankfold.train.asked.recipe import Recipe
from rankfold.train.compiling import compile_layers
from rankfold.train.planning.start import adapted, fit_base, spelt_tokens
from rankfold.train.planning.trial import Activations, Trial, recompute_activations
from rankfold.train.processes import Processes

NAMED_ROWS = 10  # of those that are too long
SHOWN_ROWS = 3  # the longest, the shortest and one by chance


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The data of a run: examples to train and judge on, and what was noticed about them."""

    train: list[Example]
    held_out: list[Example]
    prompt_style: PromptStyle
    shape: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided before the first step.  ``model`` is the base with its adapter on it; ``started``
    are the facts of the adapter that the run starts from, the usual ones if from a fresh one."""

    recipe: Recipe
    settings: Settings
    base: Base
    model: PeftModel
    rows: Rows
    train: Sequence[EncodedRow]
    held_out: list[EncodedRow]
    proof: MaskProof
    lengths: Lengths
    notes: list[str]
    batching: Batching
    activations: Activations
    precision: Precision
    tokens_per_second: float
    processes: Processes
    started: AdapterMetadata

    @property
    def choices(self) -> dict[str, str | bool]:
        """What was chosen beside the settings, under the recipe's names."""
        return {
            "batching": self.batching.kind,
            "precision": self.precision.name,
            "activation_checkpointing": self.activations.recomputed,
        }

    @property
    def pad_id(self) -> int:
        return int(self.base.tokenizer.pad_token_id or self.base.tokenizer.eos_token_id or 0)

    @property
    def expected_minutes(self) -> float:
        """Training at the speed just measured, and two evaluations at twice that speed, by all processes."""
        steps_per_epoch = math.ceil(len(self.train) / self.settings.rows_per_step)
        per_step = sum(map(len, self.train)) / steps_per_epoch
        tokens = self.settings.steps * per_step + sum(map(len, self.held_out))
        return tokens / self.tokens_per_second / self.processes.count / 60


def read_data(recipe: Recipe, sees_images: bool | None = None) -> Rows:
    """Read and split the rows; whether the model ``sees_images`` is found out if it is not given.

    Raises DataError."""
    data = _read(recipe, recipe.data)
    _refuse_untrainable(data.examples, recipe, sees_images)
    notes = _noticed(data)
    if recipe.held_out is None or isinstance(recipe.held_out, float):
        train, held_out = split_held_out(data.examples, recipe.held_out)
        dropped = len(data.examples) - len(train) - len(held_out)
        if dropped:
            notes.append(f"{dropped} training rows left out: copies or near copies of held-out rows")
    else:
        other = _read(recipe, recipe.held_out)
        _refuse_untrainable(other.examples, recipe, sees_images)
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
        prompt_style=data.prompt_style,
        shape=data.description,
        notes=notes,
    )


def _read(recipe: Recipe, data: str | Path | list[Source]) -> Mixture:
    sources = sources_of(data, recipe.shape, recipe.encoding, recipe.leave_out)
    return read_examples(sources, recipe.seed, recipe.skip_bad)


def has_images(examples: Sequence[Example]) -> bool:
    return any(message.images for example in examples for message in example.messages)


def _refuse_untrainable(examples: Sequence[Example], recipe: Recipe, sees_images: bool | None) -> None:
    if sees_images is None:
        sees_images = has_images(examples) and load_processor(recipe.model) is not None
    refuse_untrainable(examples, sees_images=sees_images)


def _noticed(data: Mixture) -> list[str]:
    """What was read otherwise than it is written, and the bad rows that the recipe allows for, the first few
    by name."""
    if not data.bad:
        return [*data.notes]
    named = [f"{row.origin}: {row.problem}" for row in data.bad]
    return [*data.notes, bullet_list(f"{len(named)} bad rows left out:", named, shown=3)]


def make_plan(recipe: Recipe, rows: Rows, precision: Precision, processes: Processes) -> Plan:
    """Load the model, encode the rows, choose the settings, adapt the model, and time one micro-batch.

    Raises ModelError, DataError, TargetError or ConfigError."""
    base = load_base(recipe.model, precision, recipe.stored)
    started = fit_base(base, recipe, rows.prompt_style)
    spelt = spelt_tokens((*rows.train, *rows.held_out), base)
    reader = reader_of(recipe, rows, base)
    encoded = encode_rows(recipe, rows, base, reader)
    train = encoded.train
    proof = prove_mask(train, base.tokenizer, SHOWN_ROWS, recipe.seed)
    template = template_of(base.tokenizer)[0] if rows.prompt_style == "chat" else ""
    named = [f"the model has no chat template; messages are written in {template}"] if template else []
    settings = settle(recipe, len(train), _size(base.model))
    if reader is not None:
        batching = batching_of_images(reader, base.model.device, recipe.batching)
    else:
        batching = choose_batching(base.model, train, settings.rows_per_step, recipe.seed, recipe.batching)
    scope = adapter_scope(base.model, recipe.targets, recipe.parts, recipe.whole)
    if recipe.whole_learning_rate is not None and not scope.modules_to_save:
        raise ConfigError("whole_learning_rate: nothing is trained whole; name a part under parts and whole")
    seen = scope.told if base.processor is not None else []
    torch.manual_seed(recipe.seed)
    model = adapted(base, recipe, settings, scope)
    _widen_trained(model)
    fuse_gates(model)
    fuse_norms(model)
    base.model = model
    pad_id = int(base.tokenizer.pad_token_id or base.tokenizer.eos_token_id or 0)
    trial = Trial(model, train, pad_id, precision)
    batching, activations = trial.room(batching, recipe.activation_checkpointing)
    if activations.recomputed:
        recompute_activations(model)
    if recipe.compile:
        compile_layers(model)
    return Plan(
        recipe=recipe,
        settings=settings,
        base=base,
        model=model,
        rows=rows,
        train=train,
        held_out=encoded.held_out,
        lengths=encoded.cut,
        proof=proof,
        notes=[
            *filter(None, [precision.cost]),
            *base.notes,
            *named,
            *rows.notes,
            *spelt,
            *encoded.notes,
            *seen,
        ],
        batching=batching,
        activations=activations,
        precision=precision,
        processes=processes,
        started=started,
        tokens_per_second=trial.tokens_per_second(batching),
    )


def _size(model: Any) -> int:
    """How many numbers a base has, however few bytes they are held in."""
    return int(model.num_parameters()) + numbers_not_shown(model)


def _widen_trained(model: torch.nn.Module) -> None:
    """Train in float32 whatever the base is held in: copies of whole modules are made in the base's format,
    and bfloat16 rounds away most steps that are small beside the weight."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@dataclass(frozen=True)
class Encoded:
    train: Sequence[EncodedRow]
    held_out: list[EncodedRow]
    cut: Lengths
    notes: list[str]


def reader_of(recipe: Recipe, rows: Rows, base: Base) -> ImageReader | None:
    """What reads the images of the rows, if any has some.  Raises ConfigError or ModelError for
    ``image_tiles`` of a model that does not count in them."""
    if recipe.image_tiles is not None and base.processor is None:
        raise ConfigError(f"image_tiles: {recipe.model} does not see images")
    if recipe.image_tiles is not None:
        set_most_tiles(base.processor, recipe.image_tiles)
    return image_reader(base.processor) if has_images([*rows.train, *rows.held_out]) else None


def encode_rows(recipe: Recipe, rows: Rows, base: Base, reader: ImageReader | None) -> Encoded:
    """Training and held-out rows as tokens, without those that are too long for the model or for
    ``recipe``; where it is silent, training rows are cut off as ``rankfold check`` would."""
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    most, train_on = recipe.max_length or longest or sys.maxsize, recipe.train_on
    encode = partial(encode_all, tokenizer=base.tokenizer, max_length=most, train_on=train_on, reader=reader)
    if reader is None:
        marks = encoding_marks(base.tokenizer, max_length=most, train_on=train_on)
        train, over_train = encode_cached(partial(encode, rows.train), rows.train, marks)
    else:
        train, over_train = encode(rows.train)
    held_out, over_held_out = encode(rows.held_out)
    lengths = summarise(array("I", map(len, train)), "tokens", longest, recipe.max_length)
    over = [*over_train, *over_held_out]
    if lengths.over:
        over += [too_long(row, lengths.cut) for row in train if len(row) > lengths.cut]
        train = [row for row in train if len(row) <= lengths.cut]
    notes = [f"left out, too long: {row}" for row in over[:NAMED_ROWS]]
    if len(over) > NAMED_ROWS:
        notes.append(f"and {len(over) - NAMED_ROWS:,} more rows that are too long")
    return Encoded(train, held_out, lengths, notes)
