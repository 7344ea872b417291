"""What a run will do, worked out and timed before it starts.

In six steps, each a function whose value the next takes: how the base reads, the rows as tokens (both in
``rows``), the settings, the weights, the adapter, and a micro-batch tried."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from rankfold.data.check.balance import Lengths
from rankfold.data.order.batches import epoch_steps
from rankfold.data.order.batching import Batching, pad_id_of, padded
from rankfold.data.order.pack import (
    SAMPLED_STEPS,
    batching_of_images,
    choose_batching,
    largest_size,
    largest_step,
)
from rankfold.data.tokens.cache import lengths_of
from rankfold.data.tokens.encode import EncodedRow
from rankfold.data.tokens.proof import MaskProof, prove_mask
from rankfold.errors import ConfigError
from rankfold.judging.forgotten import General
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.layers.packed import numbers_not_shown
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.base.base import Base
from rankfold.models.base.fitting import grow_vocabulary
from rankfold.models.base.load import load_base
from rankfold.models.base.memory import used_memory_bytes
from rankfold.models.base.precision import Precision
from rankfold.models.messages.images import ImageReader
from rankfold.models.messages.template import template_of
from rankfold.models.running.fusing import fuse
from rankfold.peft_surface import PeftModel
from rankfold.processes import Processes
from rankfold.train.asked.advise import Settings, settle, steps_of, within_time
from rankfold.train.asked.recipe import Recipe
from rankfold.train.compiling import compile_layers
from rankfold.train.planning.arithmetic import general_seconds
from rankfold.train.planning.budget import fast_tokens
from rankfold.train.planning.capacity import Capacity
from rankfold.train.planning.peak import Preflight
from rankfold.train.planning.rates import Probe
from rankfold.train.planning.recomputing import Activations
from rankfold.train.planning.rows import Prepared, Rows, Text
from rankfold.train.planning.start import adapted
from rankfold.train.planning.starting import Seen, told_of
from rankfold.train.planning.trial import Cost, Trial

SAMPLED_ROWS = 500  # for the trial
SHOWN_ROWS = 3  # the longest, the shortest and one by chance
MOST_RECALLED = 100  # rows that were trained on, looked at again at the end
ANSWER_TOKENS, GENERAL_ANSWER_TOKENS = 64, 32  # of an answer to a sampled and to a general question, at most
# A forward for a new token of some answers, and for a token of general text with all its logits twice, beside
# that of a token in a micro-batch; of the runs of benchmarks/predicted.py.
ANSWER_WORK, GENERAL_WORK = 16, 1.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided before the first step.  ``settings.steps`` are those that fit into the time that the
    recipe gives, ``most_steps`` those without it; ``fused`` says what is computed as one; ``general`` is the
    text by which it is told what was forgotten, ``probe`` the rates that were tried, ``preflight`` what its
    largest step took, ``resting_bytes`` what the process used before that.  ``model`` is the
    base with its adapter on it; ``started`` are the facts of the adapter that the run starts from, the usual
    ones if from a fresh one."""

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
    reader: ImageReader | None
    activations: Activations
    precision: Precision
    fused: str
    cost: Cost
    most_steps: int
    processes: Processes
    started: AdapterMetadata
    general: General | None
    probe: Probe | None = None
    resting_bytes: int = 0
    preflight: Preflight | None = None

    @property
    def choices(self) -> dict[str, str | bool | int]:
        """What was chosen beside the settings, under the recipe's names."""
        return {
            "batching": self.batching.kind,
            "precision": self.precision.name,
            "activation_checkpointing": self.activations.recomputed,
            "micro_batch_tokens": self.batching.tokens,
        }

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.base.tokenizer)

    @property
    def parameters(self) -> int:
        """How many numbers the base has, with its adapter."""
        return _size(self.model.get_base_model())

    @property
    def capacity(self) -> Capacity:
        trained, _ = self.model.get_nb_trainable_parameters()
        tokens, loss = self.proof.trained_tokens, self.cost.loss
        return Capacity(rank=self.settings.rank, numbers=trained, tokens=tokens, loss=loss)

    @property
    def seconds_per_step(self) -> float:
        return _seconds_per_step(self.train, self.settings, self.recipe, self.cost, self.batching)

    @property
    def tokens_per_second(self) -> float:
        """Of one process, without the padding."""
        per_step = sum(lengths_of(self.train)) * self.settings.rows_per_step / len(self.train)
        return per_step / self.seconds_per_step

    @property
    def look_seconds(self) -> float:
        """A look at the held-out rows, by all processes."""
        side_by_side = padded(self.reader, self.batching.tokens)
        seconds = self.cost.seconds(side_by_side.cut(self.held_out), side_by_side)
        limited = self.recipe.forget_limit is not None
        return self.cost.forward * seconds / self.processes.count + limited * self.general_seconds

    @property
    def general_seconds(self) -> float:
        """General text read once, by each process."""
        tokens = 0 if self.general is None else self.general.tokens
        return GENERAL_WORK * self.cost.forward * self.cost.per_token * tokens

    @property
    def expected_minutes(self) -> float:
        """The steps and the looks between them, and the base and the tuned model judged at the end: on rows
        held out and as many that were trained on, on general text, and in a few answers."""
        every = self.settings.evaluate_every_steps
        looks = (self.settings.steps - 1) // every if every else 0
        recalled = min(1.0, MOST_RECALLED / len(self.held_out))
        steps = self.settings.steps * self.seconds_per_step / self.processes.count
        judging = self.look_seconds * (1 + recalled) + self.general_seconds + self._answering_seconds
        return (steps + looks * self.look_seconds + 2 * judging) / 60

    @property
    def _answering_seconds(self) -> float:
        tokens = ANSWER_TOKENS * (self.recipe.samples > 0)
        tokens += GENERAL_ANSWER_TOKENS * (self.general is not None)
        return tokens * ANSWER_WORK * self.cost.forward * self.cost.per_token


def make_plan(
    recipe: Recipe,
    prepared: Prepared,
    precision: Precision,
    processes: Processes,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Load the model, choose the settings, adapt the model, and time one micro-batch; ``tell`` says how far a
    start that looks at rows is.

    Raises ModelError, TargetError or ConfigError."""
    rows, encoded, text = prepared.rows, prepared.encoded, prepared.text
    base = load_weights(recipe, text, precision, rows)
    settings = settle(recipe, len(encoded.train), _size(base.model))
    batching = _batching(recipe, prepared, base, settings, precision)
    seen = Seen(encoded.train, batching, pad_id_of(text.tokenizer), precision, recipe.seed, tell)
    model, fused, told = _adapt(recipe, base, settings, seen)
    resting_bytes = used_memory_bytes(model.device)
    trial = Trial(model, _sample(encoded.train), pad_id_of(text.tokenizer), precision)
    largest = largest_size(
        batching, largest_step(encoded.train, batching, settings.rows_per_step, recipe.seed)
    )
    fixed, recompute = recipe.micro_batch_tokens is not None, recipe.activation_checkpointing
    batching, activations = trial.room(batching, largest, recompute, fixed=fixed)
    if recipe.compile:
        compile_layers(model)
    cost = trial.cost(batching)
    if recipe.max_minutes is not None:
        per_step = _seconds_per_step(encoded.train, settings, recipe, cost, batching) / processes.count
        settings = within_time(settings, recipe, _size(base.model), per_step)
    costs = [precision.cost] if precision.cost else []
    plan = Plan(
        recipe=recipe,
        settings=settings,
        base=replace(base, model=model),
        model=model,
        rows=rows,
        train=encoded.train,
        held_out=encoded.held_out,
        lengths=encoded.cut,
        proof=prove_mask(encoded.train, text.tokenizer, SHOWN_ROWS, recipe.seed),
        notes=[*costs, *base.notes, *rows.notes, *encoded.notes, *told],
        batching=batching,
        reader=encoded.reader,
        activations=activations,
        precision=precision,
        processes=processes,
        started=text.started or AdapterMetadata(),
        fused=fused,
        cost=cost,
        most_steps=steps_of(len(encoded.train), settings, recipe),
        general=None,
        resting_bytes=resting_bytes,
    )
    advice = [plan.capacity.advice] if plan.capacity.advice else []
    return replace(plan, general=_general(plan, prepared), notes=[*plan.notes, *advice])


def cost_of(plan: Plan) -> Cost:
    """What a micro-batch takes as the plan's model is now."""
    return Trial(plan.model, _sample(plan.train), plan.pad_id, plan.precision).cost(plan.batching)


def _general(plan: Plan, prepared: Prepared) -> General | None:
    """General text as the model reads it; of what comes along so much as takes little beside the run, unless
    the run hangs on it."""
    if not prepared.general:
        return None
    forward = partial(plan.precision.autocast, plan.model.device)
    most = prepared.text.longest or sys.maxsize
    general = General.encoded(prepared.general, prepared.text.tokenizer, most, plan.pad_id, forward)
    if plan.recipe.general is None and plan.recipe.forget_limit is None:
        seconds = general_seconds(60 * plan.expected_minutes)
        per_token = 2 * GENERAL_WORK * plan.cost.forward * plan.cost.per_token
        general = general.first(int(seconds / per_token) if per_token else sys.maxsize)
    return general if general.rows else None


def _seconds_per_step(
    rows: Sequence[EncodedRow], settings: Settings, recipe: Recipe, cost: Cost, batching: Batching
) -> float:
    """By the batches that the first steps will have, in one process."""
    steps = list(islice(epoch_steps(rows, settings.rows_per_step, recipe.seed), SAMPLED_STEPS))
    return sum(cost.seconds(batching.cut(step), batching) for step in steps) / len(steps)


def _sample(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Rows of every length that there is, the longest among them."""
    lengths = lengths_of(rows)
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    return [rows[place] for place in by_length[:: -max(1, len(rows) // SAMPLED_ROWS)]]


def load_weights(recipe: Recipe, text: Text, precision: Precision, rows: Rows) -> Base:
    """The base with its weights, which reads as ``text`` does."""
    base = load_base(recipe.model, precision, recipe.stored)
    style, notes = rows.prompt_style, []
    if recipe.adapter is not None:
        notes += grow_vocabulary(base.model, recipe.adapter)
    notes += text.notes
    before = text.started
    if before is not None and before.versions and before.prompt_style != style:
        notes.append(f"the adapter was trained on {before.prompt_style} rows, and these are {style}")
    template = template_of(text.tokenizer)[0] if style == "chat" else ""
    if template:
        notes.append(f"the model has no chat template; messages are written in {template}")
    read = replace(base, tokenizer=text.tokenizer, processor=text.processor, prompt_style=style)
    return read.noting(notes)


def _batching(
    recipe: Recipe, prepared: Prepared, base: Base, settings: Settings, precision: Precision
) -> Batching:
    reader, train = prepared.encoded.reader, prepared.encoded.train
    most = recipe.micro_batch_tokens or fast_tokens(base.model, precision.compute)
    if reader is not None:
        return batching_of_images(reader, most, recipe.batching)
    return choose_batching(base.model, train, settings.rows_per_step, recipe.seed, recipe.batching, most)


def _adapt(recipe: Recipe, base: Base, settings: Settings, seen: Seen) -> tuple[PeftModel, str, list[str]]:
    """``base`` with its adapter on it; what of it is computed as one; and which parts of it are trained."""
    scope = adapter_scope(base.model, recipe.targets, recipe.parts, recipe.whole)
    if recipe.whole_learning_rate is not None and not scope.modules_to_save:
        raise ConfigError("whole_learning_rate: nothing is trained whole; name a part under parts and whole")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = adapted(base, recipe, settings, scope, seen)
    _widen_trained(model)
    told = [*(scope.told if base.processor is not None else []), *told_of(recipe, model)]
    return model, fuse(model, seen.precision.compute), told


def _size(model: Any) -> int:
    """How many numbers a base has, however few bytes they are held in."""
    return int(model.num_parameters()) + numbers_not_shown(model)


def _widen_trained(model: torch.nn.Module) -> None:
    """Train in float32 whatever the base is held in: copies of whole modules are made in the base's format,
    and bfloat16 rounds away most steps that are small beside the weight."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
