"""Reading an adapter that mlx has trained, or that was written for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rankfold.errors import AdapterError, bullet_list
from rankfold.lora import LoraConfig
from rankfold.lora.config.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from rankfold.lora.config.strict_json import read_json_object
from rankfold.lora.files.adapter_metadata import METADATA_NAME, AdapterMetadata
from rankfold.lora.files.lora_weights import Pair, pair_tensors
from rankfold.lora.placing.targets import alpha_of, rank_of, shortest_list
from rankfold.models.mlx.layout import MAGNITUDE, MLX_WEIGHTS, RECORD, MlxBase, Unpacked

ENDINGS = {"lora_a": "A", "lora_b": "B", "m": MAGNITUDE}


def model_of(folder: Path) -> str | None:
    """The base that the adapter in ``folder`` names, if it does.  Raises AdapterError."""
    model = read_json_object(folder / CONFIG_NAME, MAX_CONFIG_BYTES).get("model")
    return model if isinstance(model, str) else None


def read_mlx(folder: Path, base: MlxBase, names: Collection[str]) -> Unpacked:
    """The adapter in ``folder``; ``names`` are all modules of the base.

    An adapter that ``write_mlx`` wrote comes back with its own config, ranks and scales.
    Raises AdapterError."""
    described = read_json_object(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
    parameters = _parameters(folder, described)
    path = folder / MLX_WEIGHTS
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    facts = _facts(folder, content)
    dora = described.get("fine_tune_type") == "dora"
    by_mlx = _pairs(tensors, float(parameters["scale"]), dora, folder)
    pairs = {base.own_name(path): pair for path, pair in by_mlx.items()}
    unknown = [path for path in pairs if path not in names]
    if unknown:
        raise AdapterError(bullet_list(f"{folder} is not of this base, which has no such modules:", unknown))
    known = _recorded(described, pairs)
    if known is not None:
        return Unpacked(_tensors(_restored(pairs, known)), known, facts)
    pairs = {path: _trimmed(pair) for path, pair in pairs.items()}
    return Unpacked(_tensors(pairs), _config(described, parameters, pairs, names), facts)


def _facts(folder: Path, weights: bytes) -> AdapterMetadata:
    """What rankfold knows of the adapter, if both files are those that it wrote.  Raises AdapterError."""
    facts = AdapterMetadata.read(folder)
    now = facts.sealed({MLX_WEIGHTS: weights, CONFIG_NAME: (folder / CONFIG_NAME).read_bytes()}, None).sha256
    changed = [name for name, expected in facts.sha256.items() if now.get(name) != expected]
    if changed:
        raise AdapterError(
            f"{folder / changed[0]} is not what was saved: its sha256 is not the one in {METADATA_NAME}; "
            f"remove {METADATA_NAME} if it was trained on since"
        )
    return facts


def _parameters(folder: Path, described: Mapping[str, Any]) -> Mapping[str, Any]:
    """mlx's ``lora_parameters``.  Raises AdapterError where there are none that can be meant."""
    path, kind = folder / CONFIG_NAME, described.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; only lora and dora are adapters")
    parameters = described.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(f"{path} holds no lora_parameters; older mlx-vlm's own layout is not read")
    for name in ("rank", "scale"):
        value = parameters.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise AdapterError(f"{path}: lora_parameters.{name} must be a number above 0, got {value!r}")
    return parameters


def _pairs(tensors: Mapping[str, Tensor], scale: float, dora: bool, folder: Path) -> dict[str, Pair]:
    """The pairs by mlx's names of the modules.  Raises AdapterError for anything else in the file."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        path, _, ending = name.rpartition(".")
        wanted = 1 if ending == "m" else 2
        if ending not in ENDINGS or tensor.dim() != wanted or not path:
            unknown.append(f"{name} {tuple(tensor.shape)}")
        else:
            found.setdefault(path, {})[ENDINGS[ending]] = tensor
    lacking = [
        f"{path} has {', '.join(sorted(own))} alone"
        for path, own in found.items()
        if own.keys() != ({"A", "B", MAGNITUDE} if dora else {"A", "B"})
    ]
    if unknown or lacking:
        problems = [*unknown, *lacking]
        raise AdapterError(bullet_list(f"{folder / MLX_WEIGHTS} holds more or less than pairs:", problems))
    return {
        path: Pair(
            own["A"].T.contiguous(),
            own["B"].T.contiguous(),
            scale,
            {key: own[key] for key in (MAGNITUDE,) if key in own},
        )
        for path, own in found.items()
    }


def _recorded(described: Mapping[str, Any], pairs: Mapping[str, Pair]) -> LoraConfig | None:
    """The config that the adapter had before it was written here; None if it is not that adapter's now."""
    record = described.get(RECORD)
    if not isinstance(record, dict) or record.get("modules") != len(pairs):
        return None
    options = record.get("config")
    if not isinstance(options, dict):
        return None
    config = LoraConfig.from_dict(options, f"{CONFIG_NAME}, {RECORD}")
    fits = all(
        rank_of(path, config) <= pair.rank
        and not pair.A[rank_of(path, config) :].any()
        and not pair.B[:, rank_of(path, config) :].any()
        for path, pair in pairs.items()
    )
    scales = {config.scale(rank_of(path, config), alpha_of(path, config)) for path in pairs}
    written = {pair.scale for pair in pairs.values()}
    return config if fits and written <= scales and config.use_dora == _has_magnitudes(pairs) else None


def _has_magnitudes(pairs: Mapping[str, Pair]) -> bool:
    return any(pair.rows for pair in pairs.values())


def _restored(pairs: Mapping[str, Pair], config: LoraConfig) -> dict[str, Pair]:
    """The pairs with the ranks and scales that ``config`` says."""
    restored = {}
    for path, pair in pairs.items():
        rank = rank_of(path, config)
        scale = config.scale(rank, alpha_of(path, config))
        b = pair.B[:, :rank] / (scale / pair.scale)
        restored[path] = Pair(pair.A[:rank], b.contiguous(), scale, pair.rows)
    return restored


def _trimmed(pair: Pair) -> Pair:
    """The pair without the places at its end that are zero in both factors."""
    used = (pair.A.any(1) | pair.B.any(0)).nonzero()
    rank = int(used[-1]) + 1 if len(used) else pair.rank
    return replace(pair, A=pair.A[:rank].contiguous(), B=pair.B[:, :rank].contiguous())


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    return {key: tensor for path, pair in pairs.items() for key, tensor in pair_tensors(path, pair).items()}


def _config(
    described: Mapping[str, Any],
    parameters: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    names: Collection[str],
) -> LoraConfig:
    """A config for an adapter that mlx trained: the scale stays what it is."""
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    targets, model = shortest_list([*pairs], [*names]), described.get("model")
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model if isinstance(model, str) else None,
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=float(parameters.get("dropout") or 0.0),
        target_modules=targets if isinstance(targets, list) else [*pairs],
        rank_pattern={path: pair.rank for path, pair in pairs.items() if pair.rank != rank},
        alpha_pattern={path: scale * pair.rank for path, pair in pairs.items() if pair.rank != rank},
        use_dora=described.get("fine_tune_type") == "dora",
    )
