"""One adapter made of several, from their files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, FiniteFloat, model_validator
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import AdapterError, ConfigError, OutputError, bullet_list
from rankfold.lora import LoraConfig
from rankfold.lora.algebra.combining import Combining, Method
from rankfold.lora.algebra.factor_svd import FactorSVD, svd_of_product
from rankfold.lora.algebra.likeness import Likeness, likeness
from rankfold.lora.config.lora_config import changes_base
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import bad_values, read_weights
from rankfold.lora.files.checkpoint import save_adapter
from rankfold.lora.files.fingerprint import compare
from rankfold.lora.files.lora_weights import A_KEYS, B_KEYS, Pair, pair_of, sorted_out
from rankfold.settings import CheckedSettings, split_at_commas

BIAS = "lora_B.bias"
DENSITY = 0.5
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SAME = ("layer_replication", "alora_invocation_tokens", "fan_in_fan_out", "lora_bias", "use_qalora")
Numbers = Annotated[list[FiniteFloat], BeforeValidator(split_at_commas)]


class CombineRequest(CheckedSettings):
    """How adapters become one.  Build it with ``CombineRequest.of``."""

    weights: Numbers = Field(
        [], description="what each adapter counts, with commas between them [1 for each]"
    )
    method: Method = Field(
        "linear",
        description="linear (the weighted sum of the updates), ties, dare_linear, dare_ties or "
        "magnitude_prune",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="share of values that all methods but linear keep [0.5]"
    )
    rank: int | None = Field(
        None, ge=1, description="cut the result to this rank by SVD [the sum of the ranks, which is exact]"
    )
    seed: int = Field(0, ge=0, description="of what dare leaves out")

    @model_validator(mode="after")
    def _check_density(self) -> CombineRequest:
        if self.method == "linear" and self.density is not None:
            raise ValueError("density is for the methods that leave values out, and linear keeps all")
        return self


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The adapter in ``out``; ``lost`` is the share of the update's norm that a lower rank leaves out."""

    out: Path
    rank: int
    modules: int
    lost: float
    likenesses: dict[tuple[str, str], Likeness]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        pairs = [{"first": a, "second": b} | asdict(each) for (a, b), each in self.likenesses.items()]
        return asdict(self) | {"out": str(self.out), "likenesses": pairs}


@dataclass(frozen=True)
class _Stored:
    """An adapter's file, which counts ``weight``.  ``keys`` are those of A and B of each module, ``saved``
    what is saved whole."""

    place: Path
    weight: float
    config: LoraConfig
    facts: AdapterMetadata
    pairs: dict[str, Pair]
    keys: dict[str, tuple[str, str]]
    saved: Mapping[str, Tensor]


def combine_adapters(
    adapters: Sequence[str | Path], out: str | Path, request: CombineRequest | None = None
) -> Combined:
    """Write to ``out`` the adapter that ``adapters`` make together; no base is read.

    Raises ConfigError, AdapterError for adapters that have no common update, or OutputError."""
    request, out = request or CombineRequest(), Path(out)
    weights = request.weights or [1.0] * len(adapters)
    if not adapters or len(weights) != len(adapters):
        raise ConfigError(f"there are {len(adapters)} adapters and {len(weights)} weights")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; name another")
    stored = [_read(Path(place), weight) for place, weight in zip(adapters, weights, strict=True)]
    notes = _check_together(stored)
    updates = [(str(each.place), _updates(each)) for each in stored]
    likenesses = {
        (name, other_name): likeness(own, other)
        for (name, own), (other_name, other) in itertools.combinations(updates, 2)
    }
    found = _combined(stored, request)
    kept = {path: svd.cut(request.rank) for path, svd in found.items()}
    rank = max(len(svd.S) for svd in kept.values())
    like = next((each for each in stored if each.saved), stored[0])
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in like.saved.items()}
    for path, svd in kept.items():
        tensors |= _tensors(path, svd, rank, _having(path, stored))
    save_adapter(tensors, _config(like.config, stored, rank), out, like.facts, like.facts.base)
    whole, left = (sum(svd.norm_squared for svd in each.values()) for each in (found, kept))
    return Combined(
        out=out,
        rank=rank,
        modules=len(kept),
        lost=math.sqrt(max(0.0, 1 - left / whole)) if whole else 0.0,
        likenesses=likenesses,
        notes=notes,
    )


def _read(place: Path, weight: float) -> _Stored:
    config = LoraConfig.from_pretrained(place)
    tensors, facts, faults = read_weights(place)
    found = sorted_out(tensors)
    pairs = {path: pair_of(path, own, config) for path, own in found.pairs.items()}
    odd = {key for pair in pairs.values() for key in pair.rows} - {BIAS}
    apart = sorted(path for path, pair in pairs.items() if pair.B.shape[1] != pair.rank)
    problems = {
        f"{', '.join(sorted(odd))}: an adapter that is more than a product of factors is no sum": bool(odd),
        f"{', '.join(apart)}: the ranks of A and B differ": bool(apart),
        "its start changed the base weights; save it with path_initial_model_for_weight_conversion first": (
            changes_base(config.init_lora_weights)
        ),
        "factors of parameters (target_parameters) cannot be combined": bool(config.target_parameters),
        "it has no low-rank factors": not pairs,
    }
    told = [text for _, text in (*faults, *bad_values(tensors))]
    if told := [*told, *(text for text, holds in problems.items() if holds), *not_plain(config)]:
        raise AdapterError(bullet_list(f"{place} cannot be combined:", told))
    keys = {
        path: tuple(next(key for key in side if key in own) for side in (A_KEYS, B_KEYS))
        for path, own in found.pairs.items()
    }
    return _Stored(place, weight, config, facts, pairs, keys, found.saved)  # type: ignore[arg-type]


def _check_together(stored: Sequence[_Stored]) -> list[str]:
    """What a user should know; raises AdapterError for adapters of two bases, or two with whole modules."""
    whole = [each for each in stored if each.saved]
    pairs = list(itertools.combinations(stored, 2))
    problems = [text for first, each in pairs for text in _problems(each, first)]
    if len(whole) > 1:
        places = " and ".join(str(each.place) for each in whole)
        problems.append(f"{places} each save modules whole, and there is one of each")
    if problems:
        raise AdapterError(bullet_list("these adapters cannot be combined:", problems))
    notes = [text for first, each in pairs for text in _notes(each, first)]
    return [
        *notes,
        *(f"what {each.place} saves whole is taken as it is, whatever its weight" for each in whole),
    ]


def _problems(each: _Stored, first: _Stored) -> list[str]:
    """What keeps two adapters from being combined."""
    pair, found = f"{each.place} and {first.place}", []
    if differ := _bases_differ(each, first):
        found.append(f"{pair} belong to different bases: {differ}")
    for key in SAME:
        values = [getattr(adapter.config, key) for adapter in (each, first)]
        if values[0] != values[1]:
            found.append(f"{pair} have {key} {values[0]} and {values[1]}")
    for path in sorted(each.pairs.keys() & first.pairs.keys()):
        shapes = [_shape(adapter.pairs[path]) for adapter in (each, first)]
        if shapes[0] != shapes[1]:
            found.append(f"{path} has updates of {shapes[0]} and {shapes[1]} in {pair}")
    return found


def _bases_differ(each: _Stored, first: _Stored) -> str | None:
    return compare(first.facts.base, each.facts.base)[0] if _can_compare(each, first) else None  # type: ignore[arg-type]


def _can_compare(each: _Stored, first: _Stored) -> bool:
    """Modules that are saved whole are not in a fingerprint."""
    known = None not in (each.facts.base, first.facts.base)
    return known and each.saved.keys() == first.saved.keys()


def _notes(each: _Stored, first: _Stored) -> list[str]:
    pair, found = f"{each.place} and {first.place}", []
    names = [adapter.config.base_model_name_or_path for adapter in (each, first)]
    if names[0] != names[1] and not _can_compare(each, first):
        found.append(f"{pair} name {names[0]} and {names[1]} as base; whether that is one cannot be told")
    styles = [adapter.facts.prompt_style for adapter in (each, first)]
    if styles[0] != styles[1]:
        found.append(f"{pair} were trained on {styles[0]} and {styles[1]} text")
    return found


def _shape(pair: Pair) -> tuple[int, ...]:
    return (pair.B.shape[0], *pair.A.shape[1:])


def _factors(pair: Pair) -> tuple[Tensor, Tensor]:
    """B with the scale (out, rank), and A (rank, in), in float64; a convolution's kernel is flat."""
    return pair.scale * pair.B.double().flatten(1), pair.A.double().flatten(1)


def _updates(each: _Stored) -> dict[str, FactorSVD]:
    return {path: svd_of_product(*_factors(pair)).cut() for path, pair in each.pairs.items()}


def _having(path: str, stored: Sequence[_Stored]) -> list[_Stored]:
    return [each for each in stored if path in each.pairs]


def _combined(stored: Sequence[_Stored], request: CombineRequest) -> dict[str, FactorSVD]:
    """The combined update of each module that any of ``stored`` changes."""
    combining, found = Combining(request.method, request.density or DENSITY), {}
    with torch.random.fork_rng():
        torch.manual_seed(request.seed)
        for path in sorted({path for each in stored for path in each.pairs}):
            having = _having(path, stored)
            factors = [_factors(each.pairs[path]) for each in having]
            found[path] = combining.of_products(factors, [each.weight for each in having]).cut()
    return found


def _tensors(path: str, svd: FactorSVD, rank: int, having: Sequence[_Stored]) -> dict[str, Tensor]:
    """The file's tensors of a module that ``having`` change, its factors filled up with zeros to ``rank``."""
    pair, (key_a, key_b) = having[0].pairs[path], having[0].keys[path]
    root, more = svd.S.sqrt(), rank - len(svd.S)
    found = {
        key_a: F.pad((svd.V * root).T, (0, 0, 0, more)).reshape(rank, *pair.A.shape[1:]),
        key_b: F.pad(svd.U * root, (0, more)).reshape(-1, rank, *pair.B.shape[2:]),
    }
    if any(each.config.lora_bias for each in having):
        parts = [(each.weight * each.pairs[path].scale, each.pairs[path].rows.get(BIAS)) for each in having]
        biases = [share * bias.double() for share, bias in parts if bias is not None]
        found[BIAS] = torch.stack(biases).sum(0)
    dtype = torch.promote_types(pair.A.dtype, torch.float32)
    return {f"{PREFIX}{path}.{key}": value.to(dtype).contiguous() for key, value in found.items()}


def _config(like: LoraConfig, stored: Sequence[_Stored], rank: int) -> LoraConfig:
    """``like`` at a scale of 1, for all modules that any of ``stored`` changes."""
    chosen: dict[str, Any] = {}
    if any(getattr(each.config, key) != getattr(like, key) for each in stored for key in SELECTION):
        paths = sorted({path for each in stored for path in each.pairs})
        chosen = {**dict.fromkeys(SELECTION), "target_modules": paths}
    return replace(
        like,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        **chosen,
    )
