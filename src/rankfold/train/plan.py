"""What a run will do, worked out and timed before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.data.batches import collate, micro_batches
from rankfold.data.encode import EncodedRow, encode_all
from rankfold.data.example import Example
from rankfold.data.formats import to_examples
from rankfold.data.proof import MaskProof, prove_mask
from rankfold.data.rows import read_rows
from rankfold.data.split import split_held_out, without_leaks
from rankfold.lora import LoraConfig, PeftModel, TaskType, get_peft_model
from rankfold.models.facts import PromptStyle
from rankfold.models.load import Base, load_base
from rankfold.models.template import template_of
from rankfold.train.advise import Settings, settle
from rankfold.train.objectives import token_losses
from rankfold.train.recipe import Recipe

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
    """Everything decided before the first step.  ``model`` is the base with a fresh adapter on it."""

    recipe: Recipe
    settings: Settings
    base: Base
    model: PeftModel
    rows: Rows
    train: list[EncodedRow]
    held_out: list[EncodedRow]
    proof: MaskProof
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
    examples, style, shape = to_examples(read_rows(recipe.data))
    notes: list[str] = []
    if recipe.held_out is None:
        train, held_out = split_held_out(examples)
        dropped = len(examples) - len(train) - len(held_out)
        if dropped:
            notes.append(f"{dropped} training rows left out: copies of held-out rows")
    else:
        held_out, held_out_style, _ = to_examples(read_rows(recipe.held_out))
        train, leaked = without_leaks(examples, held_out)
        if leaked:
            notes.append(
                f"{len(leaked)} training rows left out: they are in the held-out file too ({leaked[0]} ...)"
            )
        if held_out_style != style:
            notes.append(f"the held-out rows are {held_out_style}, the training rows {style}")
    return Rows(train=train, held_out=held_out, prompt_style=style, shape=shape, notes=notes)


def make_plan(recipe: Recipe, rows: Rows) -> Plan:
    """Load the model, encode the rows, choose the settings, adapt the model, and time one micro-batch.

    Raises ModelError, DataError, TargetError or ConfigError."""
    base = load_base(recipe.model)
    base.prompt_style = rows.prompt_style
    train, cut_train = encode_all(rows.train, base.tokenizer, recipe.max_length)
    held_out, cut_held_out = encode_all(rows.held_out, base.tokenizer, recipe.max_length)
    proof = prove_mask(train, base.tokenizer, SHOWN_ROWS, recipe.seed)
    cut = [*cut_train, *cut_held_out]
    template = template_of(base.tokenizer)[0] if rows.prompt_style == "chat" else ""
    named = [f"the model has no chat template; messages are written in {template}"] if template else []
    notes = [*base.notes, *named, *rows.notes, *(f"left out, too long: {row}" for row in cut[:10])]
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
        proof=proof,
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
