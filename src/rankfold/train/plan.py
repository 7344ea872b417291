"""What a run will do, worked out and timed before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.data.batches import collate, micro_batches
from rankfold.data.encode import EncodedRow, encode_all
from rankfold.data.example import Example
from rankfold.data.formats import refuse_untrainable
from rankfold.data.sources import Mixture, read_examples, sources_of
from rankfold.data.split import split_held_out, without_leaks
from rankfold.errors import bullet_list
from rankfold.lora import LoraConfig, PeftModel, TaskType, get_peft_model
from rankfold.models.facts import PromptStyle
from rankfold.models.load import Base, load_base
from rankfold.train.advise import Settings, settle
from rankfold.train.objectives import token_losses
from rankfold.train.recipe import Recipe


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
    """Everything decided before the first step.  ``model`` is the base with a fresh adapter on it."""

    recipe: Recipe
    settings: Settings
    base: Base
    model: PeftModel
    rows: Rows
    train: list[EncodedRow]
    held_out: list[EncodedRow]
    notes: list[str]
    tokens_per_second: float

    @property
    def pad_id(self) -> int:
        return int(self.base.tokenizer.pad_token_id or self.base.tokenizer.eos_token_id or 0)

    @property
    def expected_minutes(self) -> float:
        """Training at the speed just measured, and two evaluations at twice that speed."""
        tokens = self.settings.epochs * sum(map(len, self.train)) + sum(map(len, self.held_out))
        return tokens / self.tokens_per_second / 60


def read_data(recipe: Recipe) -> Rows:
    """Read and split the rows; raises DataError."""
    data = read_examples(sources_of(recipe.data, recipe.shape), recipe.seed, recipe.skip_bad)
    refuse_untrainable(data.examples)
    notes = _left_out(data)
    if recipe.held_out is None:
        train, held_out = split_held_out(data.examples)
        dropped = len(data.examples) - len(train) - len(held_out)
        if dropped:
            notes.append(f"{dropped} training rows left out: copies of held-out rows")
    else:
        other = read_examples(sources_of(recipe.held_out, recipe.shape), recipe.seed, recipe.skip_bad)
        refuse_untrainable(other.examples)
        notes += _left_out(other)
        held_out = other.examples
        train, leaked = without_leaks(data.examples, held_out)
        if leaked:
            notes.append(
                f"{len(leaked)} training rows left out: they are in the held-out file too ({leaked[0]} ...)"
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


def _left_out(data: Mixture) -> list[str]:
    """A note on the bad rows that the recipe allows for, naming the first few."""
    if not data.bad:
        return []
    named = [f"{row.origin}: {row.problem}" for row in data.bad]
    return [bullet_list(f"{len(named)} bad rows left out:", named, shown=3)]


def make_plan(recipe: Recipe, rows: Rows) -> Plan:
    """Load the model, encode the rows, choose the settings, adapt the model, and time one micro-batch.

    Raises ModelError, DataError, TargetError or ConfigError."""
    base = load_base(recipe.model)
    base.prompt_style = rows.prompt_style
    train, cut_train = encode_all(rows.train, base.tokenizer, recipe.max_length)
    held_out, cut_held_out = encode_all(rows.held_out, base.tokenizer, recipe.max_length)
    cut = [*cut_train, *cut_held_out]
    notes = [*base.notes, *rows.notes, *(f"left out, too long: {row}" for row in cut[:10])]
    if len(cut) > len(cut[:10]):
        notes.append(f"and {len(cut) - 10} more rows over {recipe.max_length:,} tokens")
    settings = settle(recipe, len(train), base.model.num_parameters())
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets,
    )
    model = get_peft_model(base.model, config)
    base.model = model
    pad_id = int(base.tokenizer.pad_token_id or base.tokenizer.eos_token_id or 0)
    return Plan(
        recipe=recipe,
        settings=settings,
        base=base,
        model=model,
        rows=rows,
        train=train,
        held_out=held_out,
        notes=notes,
        tokens_per_second=_measure_speed(model, train, pad_id),
    )


def _measure_speed(model: Any, rows: list[EncodedRow], pad_id: int) -> float:
    """Tokens per second of forward and backward on the longest micro-batch, the second time it runs.

    Nothing remains of it but the warm memory: the gradients are dropped."""
    worst = micro_batches(rows)[-1]
    seconds = 0.0
    with torch.random.fork_rng():
        for _ in range(2):
            started = time.perf_counter()
            token_losses(model, collate(worst, pad_id, model.device)).sum().backward()
            model.zero_grad()
            seconds = time.perf_counter() - started
    return sum(map(len, worst)) / seconds
