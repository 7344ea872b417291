"""``forecast``: what a run would take in memory and time, from the config and the rows alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.data.order.batches import MICRO_BATCH_TOKENS
from rankfold.data.shapes.example_store import Joined
from rankfold.lora.layers.linear import LinearUpdates
from rankfold.lora.layers.registry import adapter_layers
from rankfold.models.adapters.modalities import adapter_scope, model_parts
from rankfold.models.base.base import Base
from rankfold.models.base.meta_model import load_outline
from rankfold.models.base.processors import sees_images
from rankfold.models.base.tokens import with_tokens
from rankfold.models.running.fusing import fuse
from rankfold.peft_surface import get_peft_model
from rankfold.train.asked.advise import Settings, settle
from rankfold.train.asked.recipe import Recipe
from rankfold.train.planning.activations import Kept, Shape, kept_by_forward
from rankfold.train.planning.arithmetic import Work, general_seconds, patches, work_of
from rankfold.train.planning.footprint import (
    FORMS_TO_PLAN,
    AdapterSize,
    StorageForm,
    parameters_by_part,
    stored_bytes,
    weights_of,
)
from rankfold.train.planning.lengths import RowLengths, TileSize, row_lengths, tile_size
from rankfold.train.planning.machine import Machine, planned_machine
from rankfold.train.planning.peak import MARGIN, WASTE, Peak, Tower, step_memory
from rankfold.train.planning.rows import read_data, spelt_tokens
from rankfold.train.planning.start import adapter_config, as_its_adapter
from rankfold.train.planning.start_memory import told_gathered
from rankfold.train.planning.starting import TAKES_FROM_BASE

Fits = Literal["yes", "recomputed", "no"]


class ForecastRequest(Recipe):
    """A recipe, and the machine to plan for.  Build it with ``ForecastRequest.of``."""

    out: Path = Field(Path("."), description="not used: a plan writes nothing")
    tokenizer: str | None = Field(
        None, min_length=1, description="folder with the tokenizer [that of the model's folder]"
    )
    tflops: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="10^12 operations a second that a step reaches [measured here]",
    )
    memory_gb: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="memory to fit into, in 10^9 bytes [what is free here]"
    )


@dataclass(frozen=True, kw_only=True)
class FormForecast:
    """A form of the base's weights: its bytes, and the peak of a run that keeps its activations or computes
    them again; ``fits`` is that of the least of them that fits, or neither."""

    name: str
    computed_in: str
    weight_bytes: int
    peak_bytes: int
    recomputed_peak_bytes: int
    fits: Fits
    seconds: float | None
    told: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that ``rankfold plan`` tells.  ``assumptions`` are sentences with their numbers filled in."""

    model: str
    source: str
    parameters: dict[str, int]
    adapter: AdapterSize
    settings: Settings
    lengths: RowLengths
    tile: TileSize | None
    micro_batch: tuple[int, int]
    operations: float
    memory_bytes: float
    forms: list[FormForecast]
    assumptions: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        train = told["lengths"].pop("train")
        told["lengths"] |= {"rows": len(train), "tokens": sum(train), "longest": max(train)}
        told["adapter"] |= {
            "weight_bytes": self.adapter.weight_bytes,
            "training_bytes": self.adapter.training_bytes,
        }
        told["parameters"] |= {"all": sum(self.parameters.values())}
        return told


def forecast(request: ForecastRequest) -> Forecast:
    """Read config and rows, and work out the rest.  No weight is read.

    Raises ModelError, DataError, TargetError or ConfigError."""
    request = as_its_adapter(request)
    base = load_outline(request.model, request.tokenizer)
    if base.tokenizer is not None:
        base = base.reading_by(with_tokens(base.tokenizer, request.eos_token, request.as_tokens))
    sees = sees_images(base.model.config)
    rows = read_data(request, sees)
    every = Joined(rows.train, rows.held_out)
    spelt = [] if base.tokenizer is None else spelt_tokens(every, base.tokenizer)
    lengths, tile = row_lengths(request, rows, base), tile_size(base, request)
    weights = weights_of(base.model)
    parameters = parameters_by_part(weights)
    settings = settle(request, len(lengths.train), sum(parameters.values()))
    shape, tower = _micro_batch(base.model, lengths, settings, request), _tower(base.model, lengths)
    adapter, work, model = _adapt(request, base, settings)
    machine = planned_machine(request.precision, request.tflops, request.memory_gb)
    linear = {path: each for path, each in adapter_layers(model) if isinstance(each, LinearUpdates)}
    twice = [weight for weight in weights if weight.is_linear] if request.start in TAKES_FROM_BASE else []
    peak = Peak(
        weights=[*weights, *twice],  # what a start left of a weight lies beside the weight
        step=step_memory(model),
        tokens=shape.rows * shape.length,
        kept=kept_by_forward(model, shape, machine.operations_per_s),
        tower=tower,
        program_bytes=machine.program_bytes,
    )
    once, again = (_operations(work, settings, lengths, recomputed=more) for more in (False, True))
    run = _Run(peak, machine, request.activation_checkpointing, (once, again))
    return Forecast(
        model=request.model,
        source=base.source.description,
        parameters=parameters,
        adapter=adapter,
        settings=settings,
        lengths=lengths,
        tile=tile,
        micro_batch=(shape.rows, shape.length),
        operations=once,
        memory_bytes=machine.memory_bytes,
        forms=[run.forecast(form) for form in FORMS_TO_PLAN],
        assumptions=[*machine.told, *_assumptions(shape, peak.kept)],
        notes=[*base.notes, *rows.notes, *spelt, *lengths.notes, *told_gathered(request.start, linear)],
    )


@dataclass(frozen=True)
class _Run:
    """What every form of the weights is held against; ``operations`` of the run, and with recomputing."""

    peak: Peak
    machine: Machine
    recompute: bool | None
    operations: tuple[float, float]

    def forecast(self, form: StorageForm) -> FormForecast:
        dtype = getattr(torch, form.name) if form.is_exact else self.machine.precision.compute
        keeping, recomputing = (self.peak.of(form, dtype, recomputed=again) for again in (False, True))
        fits = self._fits(keeping, recomputing)
        seconds = self.operations[fits != "yes"] / self.machine.operations_per_s[dtype]
        seconds += general_seconds(seconds)
        return FormForecast(
            name=form.name,
            computed_in=str(dtype).removeprefix("torch."),
            weight_bytes=stored_bytes(self.peak.weights, form, dtype.itemsize),
            peak_bytes=keeping,
            recomputed_peak_bytes=recomputing,
            fits=fits,
            seconds=None if fits == "no" else seconds,
            told=form.told,
        )

    def _fits(self, keeping: int, recomputing: int) -> Fits:
        room = self.machine.memory_bytes / MARGIN
        if keeping <= room and self.recompute is not True:
            return "yes"
        return "recomputed" if recomputing <= room and self.recompute is not False else "no"


def _adapt(request: Recipe, base: Base, settings: Settings) -> tuple[AdapterSize, Work, Any]:
    """The adapter's size, the work of a run, and the adapted model; the base is changed."""
    scope = adapter_scope(base.model, request.targets, request.parts)
    parts, plain = model_parts(base.model), work_of(base.model, {})
    config = adapter_config(request, settings, scope)
    with torch.device("meta"):
        model = get_peft_model(base.model, config)
    fuse(model)
    inner = model.get_base_model()
    trained: Counter[str] = Counter()
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            trained[parts.part_of(name) or "language"] += parameter.numel()
    size = AdapterSize(
        rank=settings.rank,
        alpha=settings.alpha,
        trained=sum(trained.values()),
        told=scope.told,
    )
    work = replace(plain, adapter=trained["language"], tiles_are_trained=bool(trained["vision"]))
    return size, work, model


def _operations(work: Work, settings: Settings, lengths: RowLengths, *, recomputed: bool) -> float:
    """Of the whole run: its steps, and a forward of the held-out rows before, after and at each look, with as
    many that were trained on before and after."""
    rows = len(lengths.train)
    trained, tiles = lengths.trained / rows, lengths.tiles / rows
    epoch = sum(work.step(length, trained, tiles, recomputed=recomputed) for length in lengths.train)
    steps = epoch * settings.steps * settings.rows_per_step / rows
    looks = settings.steps // settings.evaluate_every_steps if settings.evaluate_every_steps else 0
    return steps + (4 + looks) * work.forward(1) * lengths.held_out


def _micro_batch(model: Any, lengths: RowLengths, settings: Settings, request: Recipe) -> Shape:
    """The longest rows, as many as a micro-batch on a CPU holds, which is larger where memory allows and it
    makes products faster."""
    longest, tokens = max(lengths.train), request.micro_batch_tokens or MICRO_BATCH_TOKENS
    rows = min(math.ceil(tokens / longest), len(lengths.train), settings.rows_per_step)
    return Shape(rows, longest, _pixels(model, lengths))


def _tower(model: Any, lengths: RowLengths) -> Tower:
    tokens, vision = patches(model), getattr(model.config, "vision_config", None)
    if not (lengths.tiles and tokens):
        return Tower(numbers=0, pixels=0)
    features = 2 * vision.intermediate_size + 4 * vision.hidden_size  # type: ignore[union-attr]
    pixels = _pixels(model, lengths)
    return Tower(
        numbers=lengths.most_tiles * tokens * features, pixels=0 if pixels is None else pixels.numel()
    )


def _pixels(model: Any, lengths: RowLengths) -> Tensor | None:
    """Those of the row with most tiles, on the meta device; None without images."""
    if not (lengths.tiles and patches(model)):
        return None
    side = model.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return torch.empty(lengths.most_tiles, 3, height, width, device="meta")


def _assumptions(shape: Shape, kept: dict[torch.dtype, Kept]) -> list[str]:
    counted = next(iter(kept.values())).guess
    how = f"by rule of thumb ({counted})" if counted else "by running its code without numbers"
    return [
        f"a micro-batch of {shape.rows} x {shape.length:,} tokens, the longest row's; what its forward "
        f"keeps is counted {how}",
        "a trained number takes 20 bytes: itself, its gradient, AdamW's two moments, and the best so far",
        f"of what is in use beside the weights, {WASTE - 1:.0%} more is held, as in measured runs, unless "
        f"activations are recomputed; what fits has room for {MARGIN:g} times its peak",
        "a token takes 2 operations a frozen weight forward and 2 backward, 6 a trained one; attention is "
        "quadratic in a row's length; trained tokens alone reach the head",
    ]
