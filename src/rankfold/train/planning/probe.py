"""The learning rate, found by trying several for a few steps before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice

import torch
from torch import Tensor

from rankfold.data.order.batches import epoch_steps
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError, TrainingError
from rankfold.judging.losses import row_losses
from rankfold.train.planning.plan import Plan
from rankfold.train.planning.rates import choose
from rankfold.train.step.average import set_weights
from rankfold.train.step.loop import Trainer
from rankfold.train.step.method import method_of
from rankfold.train.step.pace import Pace

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the usual rate
SHARE = 0.2  # of the run's steps, for all rates together
LEAST_STEPS, MOST_STEPS = 8, 40  # for each rate
JUDGED_ROWS = 48


def probed(plan: Plan, on_rate: Callable[[float], object] = lambda _: None) -> Plan:
    """``plan`` with the rate that a probe of its first steps prefers to the usual one, if one is clearly
    better.

    The rows to judge by are taken from the training rows, so that those held out stay unseen.  The model is
    left as it was.  Raises ConfigError if the base is cut among processes, or there are too few rows."""
    recipe, settings = plan.recipe, plan.settings
    if recipe.shard_base:
        raise ConfigError("probe: not with a base that is cut among processes; name learning_rate")
    judged, train = _parted(plan.train)
    if len(train) < settings.rows_per_step or not judged:
        raise ConfigError(f"probe: {len(plan.train)} rows are too few to try rates on; name learning_rate")
    length = max(LEAST_STEPS, min(MOST_STEPS, int(SHARE * settings.steps / len(FACTORS))))
    steps = list(islice(_steps(train, settings.rows_per_step, recipe.seed), length))
    trained = {name: p for name, p in plan.model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses: dict[float, Tensor | str] = {}
    for rate in (float(f"{factor * settings.learning_rate:.3g}") for factor in FACTORS):
        on_rate(rate)
        losses[rate] = _tried(plan, rate, steps, judged)
        set_weights(trained, start)
    counts = torch.tensor([row.weight for row in judged], dtype=torch.float64)
    usual = float(f"{settings.learning_rate:.3g}")
    probe = choose(losses, counts, usual, (length, settings.steps), recipe.seed)
    reasons = settings.reasons | {"learning_rate": probe.reason}
    found = replace(settings, learning_rate=probe.chosen, reasons=reasons)
    return replace(plan, settings=found, probe=probe)


def _parted(rows: Sequence[EncodedRow]) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Some rows to judge by, spread over all, and the others."""
    most = min(JUDGED_ROWS, len(rows) // 4)
    places = {(2 * place + 1) * len(rows) // (2 * most) for place in range(most)}
    judged = [rows[place] for place in sorted(places)]
    return judged, [rows[place] for place in range(len(rows)) if place not in places]


def _steps(rows: Sequence[EncodedRow], rows_per_step: int, seed: int) -> Iterator[list[EncodedRow]]:
    """Those of one epoch after another."""
    return chain.from_iterable(epoch_steps(rows, rows_per_step, seed, epoch) for epoch in count())


def _tried(
    plan: Plan, rate: float, steps: Sequence[list[EncodedRow]], judged: list[EncodedRow]
) -> Tensor | str:
    """The row losses of ``judged`` after ``steps`` at ``rate``, which rises and falls as in a whole run; or
    why it broke off."""
    length = len(steps)
    warmup = max(1, round(plan.recipe.warmup_share * length))
    short = replace(plan.settings, learning_rate=rate, steps=length, warmup_steps=warmup)
    method = method_of(plan.recipe, short, plan.batching, plan.precision)
    trainer = Trainer(plan.model, plan.pad_id, Pace(length), method, plan.processes)
    try:
        trainer.run(steps, lambda _: None, lambda: False)
    except TrainingError as error:
        return str(error)
    with trainer.counting(), plan.precision.autocast(plan.model.device):
        found = row_losses(plan.model, judged, plan.pad_id, plan.processes, plan.reader)
    return found if bool(found.isfinite().all()) else "its loss is not finite"
