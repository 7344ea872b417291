"""Reading an adapter's folder and checking it against a model, before the model is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from rankfold.errors import AdapterError, ConfigError, TargetError, bullet_list, nearest
from rankfold.lora.config.lora_config import CONFIG_NAME, LoraConfig, from_hub
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.patterns import check_patterns
from rankfold.lora.files.adapter_metadata import METADATA_NAME, AdapterMetadata, log
from rankfold.lora.files.fingerprint import BaseFingerprint, compare, fingerprint
from rankfold.lora.files.old_experts import with_fused_experts
from rankfold.lora.files.renames import renamed
from rankfold.lora.files.saved_embeddings import replaced_by
from rankfold.lora.layers.init import changed_base
from rankfold.lora.placing.targets import alpha_of, find_parameters, find_targets, module_names, rank_of

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"  # read, and never written
MAX_HEADER_BYTES = 32_000_000  # 200,000 tensors with names of 80 letters
MAX_KEY_SHOWN = 200
HARMLESS_RANK = 64  # costs little; if it is wrong, that is listed with all other faults
MAX_SCALE = torch.finfo(torch.float32).max
FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)

# What PEFT lets through without a word.
LENIENT: tuple[Fault, ...] = ("missing", "unexpected", "base", "config", "option")
# What may be let through on loading: tensors that the model wants and the file lacks keep their fresh
# values, those that it has no place for or of the wrong shape are dropped, "non_finite" takes NaN as it
# is, "base" takes an adapter of another base, "hash" weights that were changed since they were saved and
# "config" a config that was,
# "option" a config with options of a newer PEFT.
Fault = Literal["missing", "unexpected", "shape", "non_finite", "base", "hash", "config", "option"]


class LoadOptions(TypedDict, total=False):
    """What ``from_pretrained`` and ``load_adapter`` take beside the folder.

    ``subfolder`` of the adapter folder; ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
    ``force_download`` are the hub's words.  ``allow``: the faults to let through, each told in one warning;
    by default LENIENT, what PEFT lets through.
    ``key_mapping``: as in PEFT, patterns for the file's keys without ``base_model.model.`` and their
    replacements, of which the first that matches counts; the default is the model's own
    ``_checkpoint_conversion_mapping``.  ``ignore_mismatched_sizes`` is PEFT's word for "shape" in ``allow``.
    The others are taken and change nothing: an adapter is where its base is."""

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    allow: Collection[Fault] | None
    key_mapping: Mapping[str, str] | None
    ignore_mismatched_sizes: bool
    low_cpu_mem_usage: bool
    torch_device: str | torch.device | None
    device_map: Any
    max_memory: Any
    offload_dir: Any
    offload_folder: Any
    offload_index: Any
    ephemeral_gpu_offload: bool


class LoadResult(NamedTuple):
    """The keys that were let through, as PEFT returns them; both empty unless allowed."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder and how strictly to read it; with ``base_is_there`` False the model has none of its
    base's weights yet, by which the base could be told."""

    folder: Path
    allow: frozenset[Fault] = frozenset()
    key_mapping: Mapping[str, str] | None = None
    base_is_there: bool = True

    @classmethod
    def of(cls, folder: str | Path, options: LoadOptions) -> AdapterSource:
        """Raises ConfigError for an option or a fault that is not known."""
        known = {*LoadOptions.__annotations__}
        wrong = [f"unknown option {name!r}{nearest(name, known)}" for name in sorted(options.keys() - known)]
        asked = options.get("allow")
        allow: set[Fault] = {*(LENIENT if asked is None else asked)}
        allow |= {"shape"} if options.get("ignore_mismatched_sizes") else set()
        faults = get_args(Fault)
        wrong += [f"allow={fault!r} is none of {', '.join(faults)}" for fault in sorted(allow - {*faults})]
        if wrong:
            raise ConfigError(bullet_list("an adapter cannot be loaded in this way:", wrong))
        return cls(adapter_folder(folder, options), frozenset(allow), options.get("key_mapping"))


@dataclass
class StoredAdapter:
    """An adapter as read from its folder: ``targets`` are the modules that its config means in the
    model, ``found`` the faults so far."""

    source: AdapterSource
    config: LoraConfig
    tensors: dict[str, Tensor]
    facts: AdapterMetadata
    found: list[tuple[Fault, str]]
    targets: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def read_adapter(source: AdapterSource, config: LoraConfig, model: nn.Module) -> StoredAdapter:
    """Read the adapter in ``source`` and check it against ``model``, which is only looked at.

    Raises AdapterError if the files cannot be read, or the config's targets or ranks cannot be meant;
    what may be allowed is in ``found``."""
    check_patterns(config, module_names(model))
    content = read_weights(source.folder)
    stored = StoredAdapter(source, config, *content)
    stored.tensors, doubled = renamed(stored.tensors, model, source.key_mapping)
    stored.found += [("unexpected", f"unexpected: a second {shown(key)}") for key in doubled]
    stored.config, stored.tensors = with_fused_experts(config, stored.tensors, model)
    config = stored.config
    try:
        stored.targets = find_targets(model, config, new=False)
        stored.parameters = find_parameters(model, config)
    except TargetError as error:
        raise AdapterError(f"{source.folder}: {error}") from error
    check_sizes(stored, model)
    stored.found += bad_values(stored.tensors)
    check_base(stored, model)
    if config.unknown_options:
        told = f"its config has options of a newer PEFT: {config.unknown_options!r:.300}"
        stored.found.append(("option", told))
    return stored


def read_weights(folder: Path) -> tuple[dict[str, Tensor], AdapterMetadata, list[tuple[Fault, str]]]:
    """The tensors and the facts in ``folder``, and a fault for each file whose hash is another.

    Raises AdapterError."""
    path, tensors = folder / WEIGHTS_NAME, cast(dict[str, Tensor] | None, None)
    if not path.is_file():
        path, tensors = folder / PICKLED_NAME, read_pickled(folder / PICKLED_NAME)
    content = path.read_bytes()
    tensors = parsed(content, path) if tensors is None else tensors
    facts = AdapterMetadata.read(folder)
    files = {path.name: content, CONFIG_NAME: (folder / CONFIG_NAME).read_bytes()}
    sums = AdapterMetadata().sealed(files, None).sha256
    changed = [name for name, expected in facts.sha256.items() if sums.get(name) != expected]
    text = "{} is not what was saved: its sha256 is not the one in " + METADATA_NAME
    return (
        tensors,
        facts,
        [("config" if name == CONFIG_NAME else "hash", text.format(name)) for name in changed],
    )


def parsed(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.  Raises AdapterError."""
    header = int.from_bytes(content[:8], "little")
    if header > MAX_HEADER_BYTES:
        raise AdapterError(f"{path} has a header of {header:,} bytes; no adapter has that many tensors")
    try:
        return load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of an ``adapter_model.bin``, by torch's loader that makes nothing but tensors.

    Raises AdapterError."""
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no {WEIGHTS_NAME}, and no {PICKLED_NAME}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises what the file makes it raise
        raise AdapterError(f"{path} holds something else than tensors, or is damaged: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise AdapterError(f"{path} is no adapter's: it does not hold tensors by name")
    return {str(key): tensor.detach() for key, tensor in found.items()}


def adapter_folder(place: str | Path, options: Mapping[str, Any]) -> Path:
    """The folder of an adapter, downloaded if ``place`` is a repository of the hub.  Raises AdapterError."""
    folder, subfolder = Path(place) / (options.get("subfolder") or ""), options.get("subfolder")
    if (folder / CONFIG_NAME).is_file() or Path(place).exists():
        return folder
    hub = {key: value for key, value in options.items() if value is not None}
    found = from_hub(place, CONFIG_NAME, subfolder, hub)
    for name in (WEIGHTS_NAME, PICKLED_NAME, METADATA_NAME):
        try:
            from_hub(place, name, subfolder, hub)
        except AdapterError:
            if name == WEIGHTS_NAME:
                continue
        if name == WEIGHTS_NAME:
            break
    return found.parent


def bad_values(tensors: Mapping[str, Tensor]) -> list[tuple[Fault, str]]:
    """A fault for each of ``tensors`` that holds NaN or infinite values."""
    wide = {
        key: tensor.float() if tensor.dtype.itemsize == 1 else tensor
        for key, tensor in tensors.items()
        if tensor.dtype in FLOATS and tensor.numel()
    }
    # One look at the largest magnitude of all; which one it is need be told only if that is not finite.
    if torch.isfinite(nn.utils.get_total_norm(list(wide.values()), math.inf)):
        return []
    bad = [key for key, tensor in wide.items() if not torch.isfinite(tensor).all()]
    return [("non_finite", f"{shown(key)} holds NaN or infinite values") for key in bad]


def check_base(stored: StoredAdapter, model: nn.Module) -> None:
    """Add a fault if ``model`` is not the base of ``stored``, and log in one line what cannot be told."""
    folder, facts = stored.source.folder, stored.facts
    if change := changed_base(stored.config):
        stored.found.append(("base", change))
    unchecked = "whether this is the base it was trained on, and whether its files are whole"
    if not stored.source.base_is_there:
        return
    if facts.base is not None:
        problem, unchecked_part = compare_base(
            facts.base, stored.config, stored.tensors, model, partial(fingerprint, model)
        )
        if problem is not None:
            stored.found.append(("base", f"the adapter belongs to another base model: {problem}"))
        unchecked = unchecked_part or ""
    if unchecked:
        log.warning("%s: could not be checked: %s", folder, unchecked)


def compare_base(
    saved: BaseFingerprint,
    config: LoraConfig,
    keys: Collection[str],
    model: nn.Module,
    print_of: Callable[[Collection[str]], BaseFingerprint],
) -> tuple[str | None, str | None]:
    """``compare`` of the base that an adapter with ``keys`` in its file was ``saved`` with and of the one
    that ``model`` is, whose fingerprint without some modules is ``print_of`` them."""
    found = compare(saved, print_of(replaced_by(model, config, keys)))
    if found[0] is not None and config.trainable_token_indices is not None:  # as older versions saved it
        return compare(
            saved, print_of(replaced_by(model, replace(config, trainable_token_indices=None), keys))
        )
    return found


def check_sizes(stored: StoredAdapter, model: nn.Module) -> None:
    """Raise AdapterError where the config asks for factors larger than those in the file, or for a scale
    that float32 cannot hold.

    Done before anything is allocated: with a rank of 10^9 in the config that would be too late."""
    rows, config = factor_rows(stored.tensors), stored.config
    problems = []
    for target in (*stored.targets, *stored.parameters):
        rank, scale = rank_of(target, config), config.scale(rank_of(target, config), alpha_of(target, config))
        known = rows.get(target, rows.get(target.rpartition(".")[0], 0))
        limit = known or (_narrow_side(model, target) if "missing" in stored.source.allow else 0)
        if rank > max(limit, HARMLESS_RANK):
            problems.append(f"{target}: rank {rank:,} in the config, {known:,} rows of lora_A in the file")
        if not scale <= MAX_SCALE:
            problems.append(f"{target}: the scale {scale:.3g} is beyond float32")
    if problems:
        raise AdapterError(bullet_list(f"{stored.source.folder} cannot be meant:", problems))


def _narrow_side(model: nn.Module, target: str) -> int:
    """The largest rank that the weight of ``target``, or ``target`` itself, can make use of."""
    owner, _, own = target.rpartition(".")
    found = getattr(model.get_submodule(owner), own)
    if isinstance(found, Tensor):
        return min(found.shape[-2:])
    weight = getattr(found, "weight", None)
    return min(weight.shape[0], weight[0].numel()) if isinstance(weight, Tensor) and weight.dim() > 1 else 0


def factor_rows(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rows of lora_A by the dotted name of its module; the larger of two that share a name."""
    rows: dict[str, int] = {}
    for key, tensor in tensors.items():
        path, dot, _ = key.removeprefix(PREFIX).replace(".lora_embedding_A", ".lora_A").rpartition(".lora_A")
        if dot and tensor.dim():
            module = path.replace(".base_layer", "")
            rows[module] = max(rows.get(module, 0), tensor.shape[0])
    return rows


def shown(key: str) -> str:
    """A key of the file as it may be printed: the file may come from anyone."""
    short = key if len(key) <= MAX_KEY_SHOWN else f"{key[:MAX_KEY_SHOWN]}... ({len(key):,} letters)"
    return short if short.isprintable() else repr(short)
