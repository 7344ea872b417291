"""Saving the adapters of a wrapped model, and loading one onto it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from rankfold.compat import WRAPPED
from rankfold.errors import AdapterError, ConfigError, RankfoldWarning, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX, check_adapter_name
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, LoadResult, read_adapter
from rankfold.lora.files.checkpoint import OTHER_NAMES, file_tensors, fill_adapter, save_adapter
from rankfold.lora.files.fingerprint import BaseFingerprint, fingerprint
from rankfold.lora.files.saved_embeddings import bring, embedding_tensors, find_brought, replaced_by
from rankfold.lora.layers.init import warn_if_random
from rankfold.lora.layers.overrides import holder_of
from rankfold.lora.layers.saved import with_task_modules
from rankfold.lora.placing.placement import find_placement, place, remove_adapter
from rankfold.lora.placing.ties import check_agreement
from rankfold.peft_surface.conversion import as_plain_adapter

if TYPE_CHECKING:
    from rankfold.peft_surface.tuner import LoraModel


def save_from(
    tuner: LoraModel,
    names: Collection[str],
    folder: Path,
    *,
    save_embeddings: bool | str,
    initial: Path | None,
    facts: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters ``names`` below ``folder``; the words are those of ``PeftModel.save_pretrained``,
    ``values`` its ``state_dict``."""
    model, forms = tuner.model, cast(dict[str, tuple[LoraConfig, dict[str, Tensor]]], {})
    for name in names:
        config = tuner.peft_config[name]
        if initial is None:
            forms[name] = config, {**file_tensors(model, name)}
        else:
            forms[name] = as_plain_adapter(model, name, config, initial)
    for name, (config, tensors) in forms.items():
        known = dataclasses.replace(tuner.adapter_metadata.get(name, AdapterMetadata()), **facts)
        warn_of_parts(tensors)
        complete = tensors | embedding_tensors(model, name, config, save_embeddings)
        place = folder if name == "default" else folder / name
        base = facts.get("base") or base_fingerprint(tuner, name, complete)
        save_adapter(taken_from(values, complete, model), config, place, known, base)
        tuner.adapter_metadata[name] = known


def warn_of_parts(tensors: Mapping[str, Tensor]) -> None:
    """Warn of factors that lost their shape: parts of them, in a process that holds no more."""
    flat = [key for key, tensor in tensors.items() if "lora_A" in key and tensor.dim() < len(("rank", "in"))]
    if flat:
        warnings.warn(
            f"{len(flat)} factors are not matrices ({flat[0]}): these look like DeepSpeed ZeRO-3 / FSDP "
            "shards. Gather them before saving, or the file is of no use",
            RankfoldWarning,
            stacklevel=4,
        )


def taken_from(
    values: Mapping[str, Tensor] | None, tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """``tensors``, of ``model`` or made for the file, with the values that a state dict has for them.

    The state dict's names may have prefixes of wrappers.  What it lacks is left out, and told."""
    if values is None:
        return {**tensors}
    clean = {_without_wrappers(name): tensor for name, tensor in values.items()}
    names = {id(t): _without_wrappers(n) for n, t in model.state_dict(keep_vars=True).items()}
    holder = holder_of(model)
    for held in (each for name in holder.applied for each in holder.held[name]) if holder is not None else ():
        names.setdefault(id(held.own), held.paths[0])  # sharding put another object in its place
    missing = [names[id(t)] for t in tensors.values() if id(t) in names and names[id(t)] not in clean]
    if missing:
        headline = "the given state dict lacks tensors of the adapter, which are left out:"
        warnings.warn(bullet_list(headline, missing), RankfoldWarning, stacklevel=4)
    found = {key: clean.get(names[id(t)]) if id(t) in names else t for key, t in tensors.items()}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _without_wrappers(name: str) -> str:
    for part in WRAPPED:
        name = name.replace(f"{part}.", "")
    return name.removeprefix("module.").removeprefix(PREFIX)


def named_as_in_model(result: LoadResult, model: nn.Module, wanted: Mapping[str, Tensor]) -> LoadResult:
    """``result`` with the missing tensors by their names in the wrapped model, which are told."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    missing = [PREFIX + names[id(wanted[k])] if id(wanted[k]) in names else k for k in result.missing_keys]
    if missing:
        warnings.warn(
            f"Found missing adapter keys while loading the checkpoint: {missing}. They keep their fresh "
            f"values. {OTHER_NAMES if result.unexpected_keys else ''}",
            RankfoldWarning,
            stacklevel=6,
        )
    return LoadResult(missing, result.unexpected_keys)


def differing(saved: LoraConfig, known: LoraConfig) -> list[str]:
    """Every option in which two configs mean another function of the same factors."""
    left, right = saved.to_dict(), known.to_dict()
    return [
        f"{key}: the file has {left[key]!r}, the model {right[key]!r}"
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
        if left[key] != right[key]
    ]


def base_fingerprint(tuner: LoraModel, name: str, saved: Collection[str]) -> BaseFingerprint:
    """The fingerprint of the base as the adapter found it, whatever is merged or split now, without what the
    adapter's file, with the keys ``saved``, puts in its place."""
    return fingerprint(tuner.model, replaced_by(tuner.model, tuner.peft_config[name], saved))


def fingerprint_to_save(tuner: LoraModel, name: str = "default") -> BaseFingerprint:
    """What ``save_adapters`` would write of the base now; for a base that cannot be read later."""
    model, config = tuner.model, tuner.peft_config[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankfoldWarning)  # it is told when the adapter is saved
        keys = [*file_tensors(model, name), *embedding_tensors(model, name, config, "auto")]
    return base_fingerprint(tuner, name, keys)


def load_onto(
    tuner: LoraModel, name: str, config: LoraConfig, source: AdapterSource, *, widen: bool = True
) -> LoadResult:
    """Place an adapter with ``config`` on the model in ``tuner`` and fill it from ``source``; one that is
    there already is filled only.

    Raises AdapterError listing all that does not fit, ConfigError for the name; nothing is changed then."""
    model, before, known = tuner.model, tuner.targeted_module_names, name in tuner.peft_config
    config.modules_to_save = with_task_modules(config).modules_to_save
    if known and (differences := differing(config, tuner.peft_config[name])):
        raise AdapterError(bullet_list(f"{source.folder} is of another adapter:", differences))
    stored = read_adapter(source, config, model)
    if not known:
        check_adapter_name(name, tuner.peft_config)
        warn_if_random(config)
        try:
            placement = find_placement(model, stored.config, name, tuner.peft_config, new=False)
            place(model, placement, name, widen=widen)
        except (ConfigError, TargetError) as error:
            raise AdapterError(f"{source.folder}: {error}") from error
        tuner.note(name, stored.config, placement.targets)
    try:
        wanted = file_tensors(model, name)
        brought = find_brought(model, stored.tensors, wanted, stored.config)
        result = fill_adapter(stored, wanted | {key: place for key, (_, place) in brought.items()})
        result = named_as_in_model(result, model, wanted)
        check_agreement(model, name, stored.tensors)
        bring(model, name, dict(brought.values()))
    except BaseException:
        if not known:
            remove_adapter(model, name)
            del tuner.peft_config[name]
            tuner.targeted_module_names = before
        raise
    tuner.adapter_metadata[name] = stored.facts
    return result
