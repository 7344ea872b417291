"""The start of a fresh adapter that looks at the base's weights, at rows, or at both.

What takes a pass over rows is made once: as an adapter folder it is kept in the run's folder and, for other
runs on the same base and rows, in the cache."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankfold.data.order.batch import Batch
from rankfold.data.order.batching import Batching
from rankfold.data.tokens.encode import EncodedRow
from rankfold.data.tokens.rows_hash import rows_hash
from rankfold.errors import CheckpointError, ConfigError, OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.lora import LoraConfig
from rankfold.lora.config.data_starts import EvaConfig, LoraGAConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.files.adapter_reader import WEIGHTS_NAME
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.lora.layers.linear import LinearUpdates
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.placing.targets import rank_of
from rankfold.lora.starts.corda import balanced, factors_of
from rankfold.lora.starts.eva import eva_start
from rankfold.lora.starts.moments import Watch
from rankfold.lora.starts.parts import EIGENS, HANDED
from rankfold.models.adapters.loftq import replace_lora_weights_loftq
from rankfold.models.base.precision import Precision
from rankfold.peft_surface import PeftModel, get_peft_model
from rankfold.peft_surface.eva import initialize_lora_eva_weights
from rankfold.peft_surface.gathering import linear_targets, preprocess_corda, preprocess_loraga
from rankfold.train.asked.recipe import Recipe
from rankfold.train.planning.start_memory import check_room
from rankfold.train.step.objectives import Supervised

FOLDER = "start"  # in a run's folder: the adapter as it began
TOLD = 5  # times that it is said how far it is
SEEN_ROWS, GRADIENT_ROWS = 256, 64  # what EVA and CorDA, and what LoRA-GA looks at
# By the recipe's word the value of ``init_lora_weights`` and what is told with it.
OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora-ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "loftq": {},
}
TAKES_FROM_BASE = ("pissa", "olora", "corda", "lora-ga")


def check_start(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError where the start of ``recipe`` does not go with the rest of it."""
    start = recipe.start
    wrong = {
        f"start={start} takes a part of the base's weights, and stored={recipe.stored} holds no rest of it; "
        "loftq is the start for such a base": start in TAKES_FROM_BASE and recipe.stored is not None,
        "start=loftq makes up for the rounding of a base that is held in few bits; say stored": start
        == "loftq"
        and recipe.stored is None,
        f"start={start} and an adapter to start from: take one of them": start != "plain"
        and recipe.adapter is not None,
        f"start={start} is worked out by one process; run one, or take start=plain": start != "plain"
        and processes > 1,
        "original is for start=loftq": recipe.original is not None and start != "loftq",
    }
    if problems := [text for text, holds in wrong.items() if holds]:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class Seen:
    """The rows that a start may look at, and how they go through the model; ``tell`` says how far it is."""

    rows: Sequence[EncodedRow]
    batching: Batching
    pad_id: int
    precision: Precision
    seed: int
    tell: Callable[[str], None]

    def batches(self, most: int, device: Any) -> Iterator[Batch]:
        """Some of the rows, chosen by the seed: packed, or one at a time, so that there is no padding."""
        places = random.Random(self.seed).sample(range(len(self.rows)), min(most, len(self.rows)))
        rows = [self.rows[place] for place in sorted(places)]
        packed = self.batching.kind == "packed"
        groups = self.batching.cut(rows) if packed else [[row] for row in rows]
        done = told = 0
        for group in groups:
            yield self.batching.collate(group, self.pad_id, device)
            done += len(group)
            if TOLD * done // len(rows) > told:
                told = TOLD * done // len(rows)
                self.tell(f"{done} of {len(rows)} rows")


def started(model: Any, plain: LoraConfig, recipe: Recipe, seen: Seen) -> PeftModel:
    """``model`` with a fresh adapter that begins as ``recipe.start`` says."""
    config = plain.replaced(**OPTIONS[recipe.start])
    if recipe.start in ("pissa", "olora"):
        return get_peft_model(model, config)
    cached = cache_folder() / "starts" / _key(model, config, recipe, seen)
    kept = _kept(recipe.out / FOLDER, cached, seen.tell)
    if kept is not None:
        return _again(model, config, recipe, kept)
    check_room(recipe.start, linear_targets(model, config), model.device)
    made = MAKERS[recipe.start](model, config, recipe, seen)
    try:
        keep_start(made, cached)
    except OutputError as error:
        seen.tell(f"not kept for other runs: {error}")
    return made


def _kept(own: Path, cached: Path, tell: Callable[[str], None]) -> dict[str, Tensor] | None:
    """The tensors of a start that was made before; one in the cache that cannot be read is made again.

    Raises CheckpointError where the run's own cannot be read."""
    for folder in (own, cached):
        file = folder / WEIGHTS_NAME
        if not file.is_file():
            continue
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            if folder == own:
                raise CheckpointError(f"{file}, the start of the run, is damaged: {error}") from error
            tell(f"made again: {file} is damaged")
            shutil.rmtree(folder)
            continue
        tell(f"taken from {folder}")
        return tensors
    return None


def keep_start(model: PeftModel, folder: Path) -> None:
    """Write the adapter as it begins into ``folder``, whole or not at all, unless it is there already."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(folder) as staging:
            model.save_pretrained(staging)


def _key(model: Any, config: LoraConfig, recipe: Recipe, seen: Seen) -> str:
    """A name for what a start depends on: base, rows, settings."""
    digest = hashlib.sha256(json.dumps(asdict(fingerprint(model)), sort_keys=True, default=str).encode())
    about = config.to_dict() | {"base_model_name_or_path": None}
    settings = [recipe.start, recipe.stored, recipe.original, recipe.seed, str(seen.precision.storage), about]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(rows_hash(seen.rows).encode())
    return digest.hexdigest()[:32]


def _again(model: Any, config: LoraConfig, recipe: Recipe, tensors: dict[str, Tensor]) -> PeftModel:
    """The start that is kept in ``tensors``."""
    first = {_path(key): value for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    second = {_path(key): value for key, value in tensors.items() if key.endswith(".lora_B.weight")}
    if recipe.start == "eva":
        made = get_peft_model(model, config)
        layers = {p: each for p, each in adapter_layers(model) if isinstance(each, LinearUpdates)}
        none = {path: torch.empty(0, layer.in_features) for path, layer in layers.items()}
        initialize_lora_eva_weights(made, eva_state_dict=none | first)  # what is not kept had no rank
        return made
    if recipe.start == "loftq":
        made = get_peft_model(model, config)
        with torch.no_grad():
            for path, layer in adapter_layers(model):
                if isinstance(layer, LinearUpdates) and path in first:
                    for factor, kept in zip(layer.factors("default"), (first, second), strict=True):
                        factor.copy_(kept[path])
        return made
    for path, lora_a in first.items():
        model.get_submodule(path).__dict__[HANDED] = lora_a, second[path]
    return get_peft_model(model, config)


def _path(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _eva(model: Any, config: LoraConfig, recipe: Recipe, seen: Seen) -> PeftModel:
    made = get_peft_model(model, config).eval()
    layers = {p: each for p, each in adapter_layers(model) if isinstance(each, LinearUpdates)}
    batch: list[Batch] = []

    def take(given: Tensor, name: str) -> Tensor:
        """The inputs of the tokens that are learnt; of a layer that sees no tokens, all."""
        rows, targets = given.reshape(-1, given.shape[-1]), batch[0].targets.places
        return rows[targets] if len(rows) == batch[0].inputs["input_ids"].numel() else rows

    def forwards() -> Iterator[None]:
        for each in seen.batches(SEEN_ROWS, made.device):
            batch[:] = [each]
            _forward(made, each, seen)
            yield

    ranks = {path: rank_of(path, config) for path in layers}
    with torch.no_grad():
        found = eva_start(Watch(model, layers, take), forwards, ranks, EvaConfig())
    initialize_lora_eva_weights(made, eva_state_dict=found)
    return made.train()


def _corda(model: Any, config: LoraConfig, recipe: Recipe, seen: Seen) -> PeftModel:
    def run() -> None:
        for batch in seen.batches(SEEN_ROWS, model.device):
            _forward(model, batch, seen)

    preprocess_corda(model, config, run)
    scale = config.scale(config.r, config.lora_alpha)
    for layer in linear_targets(model, config).values():
        layer.__dict__[HANDED] = balanced(*factors_of(layer.__dict__.pop(EIGENS), scale))
    return get_peft_model(model.train(), config)


def _lora_ga(model: Any, config: LoraConfig, recipe: Recipe, seen: Seen) -> PeftModel:
    def run() -> None:
        for batch in seen.batches(GRADIENT_ROWS, model.device):
            losses, weight = _forward(model, batch, seen)
            (losses / weight).backward()

    preprocess_loraga(model, config, run)
    return get_peft_model(model, config)


def _loftq(model: Any, config: LoraConfig, recipe: Recipe, seen: Seen) -> PeftModel:
    made = get_peft_model(model, config)
    left = replace_lora_weights_loftq(made, recipe.original or recipe.model)
    shares = sorted(left.values())
    seen.tell(f"{1 - shares[len(shares) // 2]:.0%} of the rounding's error made up for in most layers")
    return made


def _forward(model: Any, batch: Batch, seen: Seen) -> tuple[Tensor, float]:
    with seen.precision.autocast(model.device):
        return Supervised().sum(model, batch)


MAKERS: dict[str, Callable[[Any, LoraConfig, Recipe, Seen], PeftModel]] = {
    "eva": _eva,
    "corda": _corda,
    "lora-ga": _lora_ga,
    "loftq": _loftq,
}


def told_of(recipe: Recipe, model: PeftModel) -> list[str]:
    """What a user should know of the start."""
    if recipe.start in TAKES_FROM_BASE:
        rank = model.active_peft_config.r
        return [
            f"start={recipe.start}: the adapter begins as a part of the base's weights; it is saved as a "
            f"plain one of rank {2 * rank}, which needs nothing but the base as it is"
        ]
    if recipe.start == "eva":
        given = [layer.r["default"] for _, layer in adapter_layers(model) if isinstance(layer, LinearUpdates)]
        return [f"start=eva: {len(given)} layers have ranks from {min(given)} to {max(given)}"]
    return []
