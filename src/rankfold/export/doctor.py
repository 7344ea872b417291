"""Whether an adapter's files fit a base and other programs, and what can be mended in them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from rankfold.compat import COMPILED
from rankfold.errors import AdapterError, RankfoldError
from rankfold.export.opened import base_name
from rankfold.export.request import ExportRequest
from rankfold.export.run import WRITERS
from rankfold.files import staged_folder
from rankfold.lora.config.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.strict_json import read_json_object
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import WEIGHTS_NAME, bad_values, read_weights
from rankfold.lora.files.checkpoint import save_adapter
from rankfold.lora.files.lora_weights import sorted_out
from rankfold.models.base.meta_model import load_outline
from rankfold.train.keeping.names import refuse_used_folder

# What wrappers and trainers put before or into the names of modules.
DECORATION = re.compile(rf"^(?:module\.|{COMPILED}\.|base_model\.model\.)+|{COMPILED}\.|(?<=\.)base_layer\.")
NAMED = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$"
)
TRIED = ("hf", "gguf-adapter", "mlx", "vllm", "sglang", "lmdeploy")
PROGRAMS = {"hf": "PEFT", "gguf-adapter": "llama.cpp", "mlx": "mlx-lm"}
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


@dataclass
class Examination:
    """``bound`` modules of the base have a pair in the file; ``unbound`` keys of the file belong to none.
    ``wrong`` would make it compute something else or nothing, ``odd`` should be known, ``mended`` is what
    ``repair`` does.  ``programs``: by name, why it cannot use the adapter, or an empty text."""

    adapter: Path
    base: str
    bound: list[str] = field(default_factory=list)
    unbound: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    programs: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def examine(adapter: str | Path, model: str | None = None) -> Examination:
    """Look at the adapter in a folder beside the base that it names, or ``model``; no weights are read.

    Raises AdapterError or ModelError for files that cannot be read at all."""
    folder = Path(adapter)
    asked = ExportRequest.of({"to": "hf", "model": model})
    config = LoraConfig.from_pretrained(folder)
    base = base_name(folder, config, asked)
    found = Examination(folder, base)
    _look_at_config(found, read_json_object(folder / CONFIG_NAME, MAX_CONFIG_BYTES), config, model)
    tensors, facts, faults = read_weights(folder)
    found.wrong += [text for _, text in [*faults, *bad_values(tensors)]]
    if not (folder / WEIGHTS_NAME).is_file():
        found.mended.append(f"the weights become {WEIGHTS_NAME}")
    _look_at_names(found, tensors, base)
    _look_at_pairs(found, tensors, facts)
    for name in TRIED:
        found.programs[PROGRAMS.get(name, name)] = _unfound(found) or _tried(folder, name, base)
    return found


def repair(found: Examination, out: str | Path) -> None:
    """Write the adapter to ``out`` with everything in ``mended`` done.  Raises AdapterError, OutputError."""
    if not found.mended:
        raise AdapterError(f"there is nothing in {found.adapter} that can be mended here")
    refuse_used_folder(Path(out))
    config = LoraConfig.from_pretrained(found.adapter)
    config.base_model_name_or_path = found.base
    tensors, facts, _ = read_weights(found.adapter)
    named = {found.renamed.get(key, key): tensor.contiguous() for key, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise AdapterError(f"{found.adapter}: several tensors would have one name; nothing is written")
    with staged_folder(Path(out)) as staging:
        save_adapter(named, config, staging, facts, facts.base)


def _look_at_config(
    found: Examination, told: Mapping[str, Any], config: LoraConfig, model: str | None
) -> None:
    if "lora_alpha" not in told:
        found.odd.append(f"the config has no lora_alpha; PEFT and others take {config.lora_alpha:g} then")
        found.mended.append(f"lora_alpha is written as {config.lora_alpha:g}")
    if config.unknown_options:
        found.odd.append(f"options of a newer PEFT, which older ones refuse: {config.unknown_options!r:.300}")
    named = told.get("base_model_name_or_path")
    if not named:
        found.odd.append("the config names no base model")
    if model is not None and named != model:
        found.mended.append(f"the base is called {model} instead of {named or 'nothing'}")


def _look_at_names(found: Examination, tensors: Mapping[str, Tensor], base: str) -> None:
    """Which keys belong to modules of the base, and what the others might be called."""
    model = load_outline(base).model
    modules = {name for name, _ in model.named_modules() if name}
    whole = modules | {name for name, _ in model.named_parameters()}
    bound, lost = set(), []
    for key in tensors:
        wanted = _own_key(key, modules, whole)
        if wanted is None:
            lost.append(key)
            continue
        bound.add(_module_of(wanted))
        if wanted != key:
            found.renamed[key] = wanted
    found.bound, found.unbound = sorted(bound & modules), sorted(lost)
    if found.renamed:
        first, second = next(iter(found.renamed.items()))
        found.odd.append(f"{len(found.renamed)} tensors are not under PEFT's names: {first} is {second}")
        found.mended.append(f"{len(found.renamed)} tensors get PEFT's names")
    if lost:
        found.wrong.append(f"{len(lost)} of {len(tensors)} tensors belong to no module of {base}: {lost[0]}")


def _own_key(key: str, modules: Collection[str], whole: Collection[str]) -> str | None:
    """What PEFT calls the tensor ``key`` of a file; None if the base has no module for it."""
    plain = NAMED.sub(lambda match: match[1] + (match[2] or ""), DECORATION.sub("", key))
    path = _module_of(plain)
    if plain == path:  # saved whole
        return key if plain in whole else None
    if path not in modules:
        ends = [name for name in modules if name.endswith(f".{path}") or path.endswith(f".{name}")]
        longest = max(ends, key=len, default="")
        if not longest or sum(len(name) == len(longest) for name in ends) > 1 or "." not in longest:
            return None
        plain = longest + plain.removeprefix(path)
    decorated = key.startswith(PREFIX) and ".base_layer." in key
    return key if decorated else PREFIX + plain


def _module_of(key: str) -> str:
    """The path of the module that a pair's key is of; a key that is none's stays what it is."""
    return re.sub(r"\.lora_[A-Za-z_]+(\.weight|\.bias)?$", "", key.removeprefix(PREFIX))


def _look_at_pairs(found: Examination, tensors: Mapping[str, Tensor], facts: AdapterMetadata) -> None:
    pairs = sorted_out({found.renamed.get(key, key): tensor for key, tensor in tensors.items()}).pairs
    halves = [path for path, own in pairs.items() if sum(key in FACTORS for key in own) == 1]
    if halves:
        found.wrong.append(f"{len(halves)} modules have one factor of two: {halves[0]}")
    idle = [
        path
        for path, own in pairs.items()
        if any(
            not tensor.any() for key, tensor in own.items() if key in ("lora_B.weight", "lora_embedding_A")
        )
    ]
    if idle and len(idle) == len(pairs):
        found.wrong.append("every pair is zero: it computes what the base does")
    elif idle:
        found.odd.append(f"{len(idle)} of {len(pairs)} pairs are zero: {idle[0]}")
    if facts.base is None:
        found.odd.append("it does not say what its base's weights were, so another base cannot be told")


def _unfound(found: Examination) -> str:
    if found.renamed:
        return f"it would not find {len(found.renamed)} tensors, which have other names (--repair)"
    return f"it would pass over {len(found.unbound)} tensors, or refuse them" if found.unbound else ""


def _tried(folder: Path, name: str, base: str) -> str:
    """Why it cannot be written for a program; empty if it can."""
    with TemporaryDirectory() as place:
        try:
            out = Path(place) / "out"
            out.mkdir()
            WRITERS[name](folder, ExportRequest.of({"to": name, "model": base, "prompts": 0}), out)
        except RankfoldError as error:
            return str(error)
    return ""


def as_json(found: Examination) -> str:
    told = {name: value for name, value in vars(found).items() if name != "renamed"}
    return json.dumps(told | {"adapter": str(found.adapter)}, indent=2, ensure_ascii=False)
