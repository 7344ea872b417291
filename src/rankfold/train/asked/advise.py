"""Choosing what the recipe leaves open, each choice with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

from rankfold.train.asked.recipe import Recipe

MANY_ROWS = 10_000
SMALL_MODEL_PARAMETERS = 2_000_000_000
HUGE_MODEL_PARAMETERS = 30_000_000_000
SHORT_RUN_STEPS = 100
FEWEST_ROWS = 4  # of a step, where time is short
SHORT_RUN_FACTOR = 1.5
USUAL_EPOCHS = 3

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe's numbers, all chosen.  ``steps`` counts optimiser steps, over all epochs."""

    rank: int
    alpha: float
    learning_rate: float
    epochs: int
    rows_per_step: int
    steps: int
    warmup_steps: int
    evaluate_every_steps: int
    reasons: dict[str, str]


def settle(recipe: Recipe, rows: int, model_parameters: int) -> Settings:
    """Fill in what ``recipe`` leaves at None for ``rows`` training rows and a model of that size."""
    reasons: dict[str, str] = {}

    def chosen(name: str, given: T | None, default: T, reason: str) -> T:
        reasons[name] = reason if given is None else "as given"
        return default if given is None else given

    rank = chosen("rank", recipe.rank, *_rank(rows))
    of_rank, called = (math.sqrt(rank), "the rank's root") if recipe.use_rslora else (float(rank), "the rank")
    reason = f"twice {called}, so the scale is 2 at any rank"
    alpha = chosen("alpha", recipe.alpha, 2 * of_rank, reason)
    rows_per_step = chosen("rows_per_step", recipe.rows_per_step, *_rows_per_step(rows))
    steps_per_epoch = math.ceil(rows / rows_per_step)
    epochs = chosen("epochs", recipe.epochs, *_epochs(steps_per_epoch, recipe.max_steps))
    steps = min(steps_per_epoch * epochs, recipe.max_steps or steps_per_epoch * epochs)
    reason = "at the end of each epoch; the best weights are kept"
    evaluate = chosen("evaluate_every_steps", recipe.evaluate_every_steps, steps_per_epoch, reason)
    rate = chosen("learning_rate", recipe.learning_rate, *_learning_rate(model_parameters, steps))
    return Settings(
        rank=rank,
        alpha=alpha,
        learning_rate=rate,
        epochs=epochs,
        rows_per_step=rows_per_step,
        steps=steps,
        warmup_steps=max(1, round(recipe.warmup_share * steps)),
        evaluate_every_steps=evaluate,
        reasons=reasons,
    )


def steps_of(rows: int, settings: Settings, recipe: Recipe) -> int:
    """The steps of all epochs, or as many as the recipe says; a time may leave fewer."""
    steps = math.ceil(rows / settings.rows_per_step) * settings.epochs
    return min(steps, recipe.max_steps or steps)


def within_time(settings: Settings, recipe: Recipe, model_parameters: int, per_step: float) -> Settings:
    """``settings`` with as many steps of ``per_step`` seconds as fit into the recipe's minutes, if those are
    fewer, and with what follows from their number."""
    assert recipe.max_minutes is not None
    rows, steps, seconds = settings.rows_per_step, settings.steps, 60 * recipe.max_minutes
    fitting = max(1, int(seconds / per_step))
    if fitting >= steps:
        return settings
    may_cut = recipe.rows_per_step is None and recipe.max_steps is None
    while may_cut and fitting < SHORT_RUN_STEPS and rows > FEWEST_ROWS:
        rows, fitting, steps = rows // 2, max(1, int(seconds / (per_step / 2))), 2 * steps
        per_step /= 2
    rate, reason = _learning_rate(model_parameters, fitting)
    if recipe.learning_rate is not None:
        rate, reason = recipe.learning_rate, settings.reasons["learning_rate"]
    told = f"{fitting:,} of {steps:,} steps fit into {recipe.max_minutes:g} minutes"
    looks = settings.evaluate_every_steps
    if recipe.evaluate_every_steps is None:
        looks = looks * settings.rows_per_step // rows
    small = {"rows_per_step": "little time: small steps, so that there are enough of them"}
    return replace(
        settings,
        steps=fitting,
        warmup_steps=max(1, round(recipe.warmup_share * fitting)),
        learning_rate=rate,
        rows_per_step=rows,
        evaluate_every_steps=looks,
        reasons=settings.reasons
        | {"learning_rate": reason, "epochs": told}
        | (small if rows != settings.rows_per_step else {}),
    )


def _rank(rows: int) -> tuple[int, str]:
    if rows > MANY_ROWS:
        return 32, f"{rows:,} rows carry more than rank 16 may hold"
    return 16, f"enough for {rows:,} rows; 32 is for more than {MANY_ROWS:,}"


def _rows_per_step(rows: int) -> tuple[int, str]:
    if rows < 8 * SHORT_RUN_STEPS:
        return 8, "few rows: small steps, so that there are enough of them"
    return 16, "LoRA learns less from large steps; 8 to 32 is the safe range"


def _epochs(steps_per_epoch: int, max_steps: int | None) -> tuple[int, str]:
    if max_steps is not None:
        epochs = math.ceil(max_steps / steps_per_epoch)
        told = f"{max_steps:,} steps as given; a pass is {steps_per_epoch:,}"
        return epochs, told if epochs <= USUAL_EPOCHS else f"{told}; beyond 3 passes rows are learnt by heart"
    epochs = min(USUAL_EPOCHS, max(1, math.ceil(SHORT_RUN_STEPS / steps_per_epoch)))
    if epochs == 1:
        return 1, f"one pass is {steps_per_epoch:,} steps, enough to learn from"
    return epochs, f"one pass is only {steps_per_epoch} steps; beyond 3 passes rows are learnt by heart"


def _learning_rate(parameters: int, steps: int) -> tuple[float, str]:
    size = f"{parameters / 1e6:,.0f} M parameters"
    if parameters > HUGE_MODEL_PARAMETERS:
        rate, reason = 1e-4, f"large model ({size})"
    elif parameters > SMALL_MODEL_PARAMETERS:
        rate, reason = 2e-4, f"usual for LoRA at {size}"
    else:
        rate, reason = 4e-4, f"small model ({size})"
    if steps < SHORT_RUN_STEPS:
        return (
            SHORT_RUN_FACTOR * rate,
            f"{reason}, and a short run ({steps} steps) needs {SHORT_RUN_FACTOR} times it",
        )
    return rate, reason
