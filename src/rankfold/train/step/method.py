"""From a recipe's settings to the method of its steps."""

from __future__ import annotations

from functools import partial

from rankfold.data.order.batching import Batching
from rankfold.models.base.precision import Precision
from rankfold.train.asked.advise import Settings
from rankfold.train.asked.recipe import Recipe
from rankfold.train.step.loop import Method
from rankfold.train.step.noise import Noisy
from rankfold.train.step.objectives import Objective, Supervised
from rankfold.train.step.schedule import learning_rate_at


def method_of(recipe: Recipe, settings: Settings, batching: Batching, precision: Precision) -> Method:
    objective: Objective = Supervised(recipe.label_smoothing)
    if recipe.neftune_alpha:
        objective = Noisy(objective, recipe.neftune_alpha)
    rates = partial(
        learning_rate_at,
        schedule=recipe.schedule,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        peak=settings.learning_rate,
    )
    whole_rate = recipe.whole_learning_rate or settings.learning_rate
    return Method(
        rates=rates,
        objective=objective,
        batching=batching,
        precision=precision,
        b_rate_factor=recipe.b_rate_factor,
        whole_rate_factor=whole_rate / settings.learning_rate,
        weight_decay=recipe.weight_decay,
        max_gradient_norm=recipe.max_gradient_norm,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
    )
