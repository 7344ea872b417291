"""The largest step of a run, carried out before its first one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from rankfold.data.order.batches import MICRO_BATCH_TOKENS, micro_batch_tokens, share
from rankfold.data.order.batching import Batching, padded
from rankfold.data.order.pack import largest_size, largest_step
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.judging.losses import row_losses
from rankfold.models.base.heap import keep_large_blocks_apart
from rankfold.models.base.memory import free_memory_bytes, peak_bytes_of, used_memory_bytes
from rankfold.processes import Processes
from rankfold.train.planning.peak import MARGIN, Preflight
from rankfold.train.planning.plan import Plan, cost_of
from rankfold.train.planning.recomputing import Activations, can_recompute, recompute_activations
from rankfold.train.planning.trial import SMALLER, Cost
from rankfold.train.step.average import set_weights
from rankfold.train.step.loop import Trainer
from rankfold.train.step.method import method_of
from rankfold.train.step.pace import Pace

LATER_BYTES = 100_000_000  # what a run needs beside its steps, to draw its report for example
PROGRAMS_BYTES = 200_000_000  # and what products in half precision leave (models.base.programs)
ALLOCATION_FAILED = ("allocate memory", "out of memory", "bad_alloc")  # in torch's errors, on a CPU or not


class _TooLargeError(Exception):
    """Memory ran out."""


def preflight(plan: Plan) -> Plan:
    """``plan`` with what its step with the largest micro-batch took: forward, backward, optimiser, and
    held-out rows judged.  Where that does not fit, micro-batches become smaller, and then activations are
    recomputed; where it took longer or less long than a few rows had promised, the run is taken to as well.

    The model is left as it was.  Raises ConfigError if one row at a time does not fit either."""
    asked = plan.batching.tokens
    while True:
        step = largest_step(plan.train, plan.batching, plan.settings.rows_per_step, plan.recipe.seed)
        own, ends = share(step, plan.processes.index, plan.processes.count), not _can_be_smaller(plan, step)
        try:
            found = _carried_out(plan, own or step)
        except _TooLargeError as failure:
            if ends:
                longest = max(map(len, step))
                raise ConfigError(f"a row of {longest:,} tokens does not fit: {failure}; {SMALLER}") from None
        else:
            if found.left_bytes < _later_bytes(plan) and ends:
                left, peak = found.left_bytes / 1e9, found.peak_bytes / 1e9
                more = f"and at its end a run needs {_later_bytes(plan) / 1e9:g} GB more"
                raise ConfigError(f"{left:.2f} GB are left beside {peak:.2f} GB in use, {more}; {SMALLER}")
            if ends or _has_room(found, plan):
                notes = [*plan.notes, *_told(found, asked, plan)]
                return replace(plan, preflight=found, notes=notes, cost=_as_long(plan, found, own or step))
        plan = _smaller(plan, step)


def _told(found: Preflight, asked: int, plan: Plan) -> list[str]:
    """What a user should know who did not ask for it."""
    told = []
    if plan.batching.tokens < asked:
        told.append(
            f"micro-batches have {plan.batching.tokens:,} tokens at most, not {asked:,}, which did not fit "
            "with room to spare; what is computed is the same"
        )
    if not _has_room(found, plan):
        told.append(f"memory is tight: {found.left_bytes / 1e9:.1f} GB stay free; {SMALLER}")
    return told


def _carried_out(plan: Plan, step: list[EncodedRow]) -> Preflight:
    """The copy of the trained weights, to which they go back, stands for that of the best ones of a run."""
    device = plan.model.device
    free, before = free_memory_bytes(device), used_memory_bytes(device)
    method = method_of(plan.recipe, plan.settings, plan.batching, plan.precision)
    trainer = Trainer(plan.model, plan.pad_id, Pace(1), method, Processes())
    start = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
    try:
        with torch.random.fork_rng(), peak_bytes_of(device) as peak, _memory_may_run_out(plan.model):
            _make_moments(trainer)
            seconds = _timed(lambda: _step(trainer, step), device)
            judging = _timed(lambda: _judge(plan, trainer), device)
            return Preflight(
                rows=len(step),
                tokens=sum(map(len, step)),
                largest=largest_size(plan.batching, step),
                seconds=seconds,
                judging_seconds=judging,
                peak_bytes=peak(),
                left_bytes=free - (peak() - before),
            )
    finally:
        set_weights(trainer.trained, start)
        plan.model.eval()


def _make_moments(trainer: Trainer) -> None:
    """So that the optimiser's memory is there during the step, as it is in all but the first of a run."""
    for parameter in trainer.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimiser.step()
    trainer.optimiser.zero_grad()


def _step(trainer: Trainer, step: list[EncodedRow]) -> None:
    trainer.model.train()
    trainer.mean_gradients(step)
    nn.utils.clip_grad_norm_(trainer.trained.values(), trainer.method.max_gradient_norm)
    trainer.optimiser.step()
    trainer.optimiser.zero_grad()


def _judge(plan: Plan, trainer: Trainer) -> None:
    side_by_side = padded(plan.reader, micro_batch_tokens(plan.model.device))
    largest = max(side_by_side.cut(plan.held_out), key=side_by_side.size)
    with trainer.counting(), plan.precision.autocast(plan.model.device):
        row_losses(plan.model, largest, plan.pad_id, reader=plan.reader)


def _as_long(plan: Plan, found: Preflight, step: list[EncodedRow]) -> Cost:
    """What a micro-batch takes, by the step that was carried out."""
    promised = plan.cost.seconds(plan.batching.cut(step), plan.batching)
    return plan.cost.times(found.seconds / promised) if promised else plan.cost


def _timed(action: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def _memory_may_run_out(model: Any) -> Iterator[None]:
    """Where memory runs out, leave nothing of it and raise _TooLargeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:
        lines = str(failure).strip().splitlines() or ["memory ran out"]
        is_memory = isinstance(failure, MemoryError | torch.OutOfMemoryError)
        if not (is_memory or any(words in str(failure) for words in ALLOCATION_FAILED)):
            raise
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise _TooLargeError(lines[0]) from None


def _has_room(found: Preflight, plan: Plan) -> bool:
    """Whether a run that takes somewhat more than the largest micro-batch did still fits."""
    of_step = max(0, found.peak_bytes - plan.resting_bytes)
    return found.left_bytes >= _later_bytes(plan) + (MARGIN - 1) * of_step


def _later_bytes(plan: Plan) -> int:
    makes_programs = plan.model.device.type == "cpu" and plan.precision.compute != torch.float32
    return LATER_BYTES + (PROGRAMS_BYTES if makes_programs else 0)


def _can_be_smaller(plan: Plan, step: list[EncodedRow]) -> bool:
    may_recompute = plan.recipe.activation_checkpointing is not False and can_recompute(plan.model)
    return _is_shared(plan, step) or (may_recompute and not plan.activations.recomputed)


def _is_shared(plan: Plan, step: list[EncodedRow]) -> bool:
    """Whether the largest micro-batch has several rows."""
    return len(max(plan.batching.cut(step), key=plan.batching.size)) > 1


def _smaller(plan: Plan, step: list[EncodedRow]) -> Plan:
    """``plan`` with micro-batches half as large, or where they are single rows, with less kept of them."""
    keep_large_blocks_apart(True)
    if _is_shared(plan, step):
        tokens = max(1, largest_size(plan.batching, step) // 2)
        return replace(plan, batching=_of_tokens(plan.batching, tokens))
    recompute_activations(plan.model)
    activations = Activations(True, "a row by itself did not fit with them")
    tokens = max(MICRO_BATCH_TOKENS, plan.batching.tokens)
    plan = replace(plan, activations=activations, batching=_of_tokens(plan.batching, tokens))
    return replace(plan, cost=cost_of(plan))


def _of_tokens(batching: Batching, tokens: int) -> Batching:
    return cast(Batching, replace(cast(Any, batching), tokens=tokens))
