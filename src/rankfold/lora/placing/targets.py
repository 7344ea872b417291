"""Which modules a LoraConfig means: PEFT's matching rules, and an error where PEFT stays silent."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Set
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rankfold.errors import ConfigError, TargetError, nearest
from rankfold.lora.config.lora_config import LoraConfig, TaskType
from rankfold.lora.layers.base import base_modules

ALL_LINEAR = "all-linear"
CLASSIFIER_NAMES = ("score", "classifier")

# PEFT 0.21.2, utils/constants.py: what target_modules=None means for a transformers model_type.
USUAL_TARGETS: dict[str, list[str] | str] = {
    **{kind: ["q", "v"] for kind in ("t5", "mt5")},
    **{kind: ["c_attn"] for kind in ("gpt2", "gpt_bigcode")},
    **{kind: ["query", "value"] for kind in ("bert", "roberta", "xlm-roberta", "electra", "layoutlm")},
    **{
        kind: ["query_key_value"]
        for kind in ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon")
    },
    **{
        kind: ["q_proj", "v_proj"]
        for kind in (
            *("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"),
            *("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        )
    },
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}


def find_targets(model: nn.Module, config: LoraConfig, *, every_entry: bool = True) -> list[str]:
    """The dotted names of the modules to adapt, in ``named_modules`` order.

    Raises TargetError if nothing matches, and, with ``every_entry``, if any listed name matches
    nothing: a misspelt entry beside good ones would otherwise train less than was asked for.  With
    ``target_parameters`` there need be no module."""
    names = module_names(model)
    wanted = resolve(model, config)
    targets = [name for name in names if is_target(name, wanted, config)]
    unmatched: list[str] = []
    if every_entry and not isinstance(wanted, str) and config.target_modules is not None:
        unmatched = sorted(wanted - {ending for name in names for ending in _endings(name)})
    may_be_none = bool(config.target_parameters) and not (every_entry and wanted)
    if unmatched or not (targets or may_be_none):
        entries = [wanted] if isinstance(wanted, str) else sorted(wanted)
        raise TargetError(_nothing_matched(unmatched or entries, names, config))
    return targets


def module_names(model: nn.Module) -> list[str]:
    """Names of all modules but the root and what adapters have added."""
    return [name for name, _ in base_modules(model) if name]


def find_parameters(model: nn.Module, config: LoraConfig, *, every_entry: bool = True) -> list[str]:
    """The dotted names of the parameters that ``target_parameters`` means, in the order of their modules.

    PEFT's rule (``_inject_parameters``): an entry is the whole name or its dotted ending, but the whole
    name only in a module with a parametrisation; layers_to_transform and exclude_modules do not count.
    Raises TargetError if an entry matches nothing, or, without ``every_entry``, if there is no target at
    all."""
    entries, found, matched = set(config.target_parameters or ()), [], set()
    known = []
    for path, module in base_modules(model) if entries else ():
        for own in _parameter_names(module):
            name = f"{path}.{own}" if path else own
            endings = [name] if is_parametrized(module) else _endings(name)
            known.append(own)
            if hits := entries.intersection(endings):
                found.append(name)
                matched |= hits
    unmatched = sorted(entries - matched)
    if unmatched and (every_entry or not (found or config.target_modules)):
        words = [f"{entry!r}{nearest(entry.rpartition('.')[2], known)}" for entry in unmatched]
        raise TargetError(f"target_parameters matched no parameter: {', '.join(words)}")
    return found


def _parameter_names(module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return sorted([*own, *cast(Any, module).parametrizations]) if is_parametrized(module) else own


def resolve(model: nn.Module, config: LoraConfig) -> Set[str] | str:
    """``target_modules`` with ``"all-linear"`` and None spelt out for this model."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return _all_linear(model, config)
    if wanted is not None:
        return wanted if isinstance(wanted, str) else frozenset(wanted)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in USUAL_TARGETS and config.target_parameters:
        return frozenset()
    if model_type not in USUAL_TARGETS:
        raise TargetError(
            f"no usual target modules are known for model type {model_type!r}; "
            'set target_modules, for example to "all-linear"'
        )
    usual = USUAL_TARGETS[model_type]
    return usual if isinstance(usual, str) else frozenset(usual)


def is_target(name: str, wanted: Set[str] | str, config: LoraConfig) -> bool:
    """PEFT's rule (``check_target_module_exists``): excluded names and all of ``modules_to_save`` lose; a
    pattern matches the whole name; an entry matches the name or its dotted ending, the latter only in
    the chosen layers."""
    if config.exclude_modules and _matches(name, config.exclude_modules):
        return False
    if any(f".{saved}." in f".{name}." for saved in config.modules_to_save or ()):
        return False
    if isinstance(wanted, str):
        return _matches(name, wanted)
    return name in wanted or (_listed(name, wanted) and _in_chosen_layer(name, config))


def pattern_value(name: str, pattern: dict[str, float], default: float) -> float:
    """The value of the first ``rank_pattern``/``alpha_pattern`` key that matches, else ``default``."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def shortest_list(targets: list[str], names: list[str]) -> list[str] | str:
    """The fewest dotted endings that mean exactly ``targets`` among ``names``, sorted.

    Keeps an adapter's config readable: seven names instead of 210 for a 30-layer model.  Where a
    target's full name is also the ending of another module, no list can tell the two apart, and a
    pattern of the full names is returned."""
    meant = set(targets)
    taken = {ending for name in names if name not in meant for ending in _endings(name)}
    if taken & meant:
        return "|".join(re.escape(target) for target in targets)
    return sorted({next(e for e in _endings(target) if e not in taken) for target in targets})


def _matches(name: str, wanted: Collection[str] | str) -> bool:
    if not isinstance(wanted, str):
        return _listed(name, wanted)
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise ConfigError(f"{wanted!r} is not a valid regular expression: {error}") from error


def _endings(name: str) -> Iterator[str]:
    """``c``, ``b.c``, ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[-k:]) for k in range(1, len(parts) + 1))


def _listed(name: str, entries: Collection[str]) -> bool:
    return any(ending in entries for ending in _endings(name))


def _in_chosen_layer(name: str, config: LoraConfig) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The lazy prefix finds the first numbered part, the layer, not an expert's number further on.
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for e in expressions if (m := re.match(e, name))), None)
    layers = [chosen] if isinstance(chosen, int) else chosen
    return match is not None and int(match.group(1)) in layers


def _all_linear(model: nn.Module, config: LoraConfig) -> set[str]:
    head = _output_head(model, config)
    linear = {n for n, m in base_modules(model) if n and _is_linear(m) and m is not head}
    if not linear:
        raise TargetError(f"{ALL_LINEAR!r} matched nothing: {type(model).__name__} has no linear layer")
    return linear


def _is_linear(module: nn.Module) -> bool:
    """A linear layer that is called as one; the output projection inside an attention layer is not."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or any(k.__name__ == "Conv1D" for k in type(module).__mro__)


def _output_head(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    output_embeddings = getattr(model, "get_output_embeddings", None)
    if output_embeddings is None:
        return None
    head: nn.Module | None = output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        return next((m for n in CLASSIFIER_NAMES if (m := getattr(model, n, None)) is not None), None)
    return head


def _nothing_matched(entries: list[str], names: list[str], config: LoraConfig) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    words = [entry.rpartition(".")[2] for entry in entries]
    near = list(dict.fromkeys(m for w in words for m in difflib.get_close_matches(w, endings, n=2)))
    examples = near or [name for name in endings if not name.isdigit()][:8] or names[:8]
    layers = config.layers_to_transform
    limits = f" within layers_to_transform={layers}" if layers is not None else ""
    limits += f" outside exclude_modules={config.exclude_modules}" if config.exclude_modules else ""
    hint = "nearest names" if near else "the model has, for example"
    return f"target_modules matched no module{limits}: {entries}; {hint}: {', '.join(examples)}"
