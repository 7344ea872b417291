"""Which modules a LoraConfig means: PEFT's matching rules, and an error where PEFT stays silent."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Set
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rankfold.errors import ConfigError, NoMatchError, RankfoldWarning, TargetError, bullet_list, nearest
from rankfold.lora.config.lora_config import LoraConfig, TaskType
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.registry import base_modules

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


def find_targets(model: nn.Module, config: LoraConfig, *, new: bool = True) -> list[str]:
    """The dotted names of the modules to adapt, in ``named_modules`` order.

    With ``target_parameters`` there need be no module.  For a ``new`` adapter, what ``config`` names and the
    model has not is told in one warning: less would be trained than was asked for.
    Raises NoMatchError if nothing matches."""
    names, wanted = module_names(model), resolve(model, config)
    targets = [name for name in names if is_target(name, wanted, config)]
    parameters = find_parameters(model, config)
    if not targets and not parameters:
        raise NoMatchError(nothing_matched(names, wanted, config))
    if new and (idle := _idle(names, targets, parameters, wanted, config)):
        headline = "a part of this adapter's config has no effect:"
        warnings.warn(bullet_list(headline, idle), RankfoldWarning, stacklevel=5)
    return targets


def module_names(model: nn.Module) -> list[str]:
    """Names of all modules but the root and what adapters have added."""
    return [name for name, _ in base_modules(model) if name]


def find_parameters(model: nn.Module, config: LoraConfig) -> list[str]:
    """The dotted names of the parameters that ``target_parameters`` means, in the order of their modules.

    PEFT's rule (``_inject_parameters``): an entry is the whole name or its dotted ending, but the whole
    name only in a module with a parametrisation; layers_to_transform and exclude_modules do not count."""
    entries, found = {*(config.target_parameters or ())}, []
    for path, module in base_modules(model) if entries else ():
        for own in _parameter_names(module):
            name = f"{path}.{own}" if path else own
            if entries.intersection([name] if is_parametrized(module) else _endings(name)):
                found.append(name)
    return found


def _idle(
    names: list[str], targets: list[str], parameters: list[str], wanted: Set[str] | str, config: LoraConfig
) -> list[str]:
    """What ``config`` says and nothing in the model answers to; PEFT's own words are part of the texts."""
    said = []
    if config.target_modules and not targets:
        said.append(f"target_modules={_shown(config.target_modules)} were set but no module was matched.")
    elif not isinstance(wanted, str) and config.target_modules is not None:
        unmatched = sorted(wanted - {ending for name in names for ending in _endings(name)})
        said += [f"target_modules: nothing is called {entry!r}{_near(entry, names)}" for entry in unmatched]
    endings = {ending for name in parameters for ending in _endings(name)}
    if config.target_parameters and not parameters:
        said.append(f"target_parameters={config.target_parameters} were set but no parameter was matched.")
    elif unmatched := sorted({*(config.target_parameters or ())} - endings):
        said.append(f"target_parameters: no parameter is called {', '.join(map(repr, unmatched))}")
    if config.exclude_modules and not any(_matches(name, config.exclude_modules) for name in names):
        said.append(
            f"You have passed exclude_modules={_shown(config.exclude_modules)} but no modules were excluded. "
            "Please check that exclude_modules was set correctly."
        )
    return [*said, *_idle_limits([*targets, *parameters], config)]


def _idle_limits(found: list[str], config: LoraConfig) -> list[str]:
    """The patterns and layer numbers that no target in ``found`` answers to."""
    said = []
    for field in ("rank_pattern", "alpha_pattern"):
        idle = [key for key in getattr(config, field) if not any(_has_pattern(name, key) for name in found)]
        if idle:
            said.append(
                f"The following {field} keys did not match any targeted module and were ignored: "
                f"{sorted(idle)}."
            )
    layers = config.layers_to_transform
    for layer in {*layers} if isinstance(layers, (list, tuple)) else () if layers is None else {layers}:
        if not any(_in_chosen_layer(name, replace(config, layers_to_transform=[layer])) for name in found):
            said.append(f"layers_to_transform: no target is in layer {layer}")
    return said


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
    model_type = type_of(model)
    if model_type not in USUAL_TARGETS and config.target_parameters:
        return frozenset()
    if model_type not in USUAL_TARGETS:
        raise TargetError(
            "Please specify `target_modules` or `target_parameters`in `peft_config`: no usual targets "
            "are known "
            f'for model type {model_type!r}; set target_modules, for example to "all-linear"'
        )
    usual = USUAL_TARGETS[model_type]
    return usual if isinstance(usual, str) else frozenset(usual)


def type_of(model: nn.Module) -> str | None:
    """The ``model_type`` in the config of a transformers model."""
    config = getattr(model, "config", None)
    found: Any = config.to_dict() if config is not None and hasattr(config, "to_dict") else config
    return found.get("model_type") if isinstance(found, dict) else getattr(found, "model_type", None)


def is_target(name: str, wanted: Set[str] | str, config: LoraConfig) -> bool:
    """PEFT's rule (``check_target_module_exists``): excluded names and all of ``modules_to_save`` lose; a
    pattern matches the whole name; an entry matches the name or its dotted ending, the latter only in
    the chosen layers."""
    if is_left_out(name, config):
        return False
    if isinstance(wanted, str):
        return _matches(name, wanted)
    return name in wanted or (_listed(name, wanted) and _in_chosen_layer(name, config))


def is_left_out(name: str, config: LoraConfig) -> bool:
    """Whether ``exclude_modules`` or ``modules_to_save`` keep a module from being a target."""
    if config.exclude_modules and _matches(name, config.exclude_modules):
        return True
    return any(f".{saved}." in f".{name}." for saved in config.modules_to_save or ())


def pattern_value(name: str, pattern: dict[str, float], default: float) -> float:
    """The value of the first ``rank_pattern``/``alpha_pattern`` key that matches, else ``default``."""
    return next((value for key, value in pattern.items() if _has_pattern(name, key)), default)


def _has_pattern(name: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


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


def nothing_matched(names: list[str], wanted: Set[str] | str, config: LoraConfig) -> str:
    """Why no module is a target; PEFT's own words are part of the text."""
    out = [name for name in names if is_left_out(name, config)]
    limits = ""
    if config.layers_to_transform is not None:
        limits = f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if config.layers_pattern:
        limits += f" You also specified 'layers_pattern': {config.layers_pattern}."
    if out and len(out) == len(names):
        return (
            "All modules were excluded. This is likely unintended. Check your `target_modules`, "
            "`exclude_modules` and `modules_to_save` configuration."
        )
    if not wanted:
        entries = {*(config.target_parameters or ())}
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values "
            f"for these arguments. target_parameters={sorted(entries)} matched no parameter"
        )
    words = [wanted] if isinstance(wanted, str) else sorted(wanted)
    hint = f"; {_examples(words, names)}"
    if isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR:
        hint = (
            "; a string is a regular expression for a module's whole dotted name, such as "
            f"{_example_pattern(config.target_modules, names)}; for the name itself give a list, "
            f"[{config.target_modules!r}]"
        )
    if out:
        return (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched "
            "target modules and excluded modules. Please check your `target_modules` and `exclude_modules` "
            "configuration. You may also have only targeted modules that are marked to be saved "
            f"(`modules_to_save`).{limits} Wanted: {_shown(wanted)}{hint}"
        )
    return (
        f"Target modules {_shown(wanted)} not found in the base model. Please check the target modules and "
        f"try again.{limits} target_modules matched no module{hint}"
    )


def _shown(entries: Collection[str] | str) -> str:
    return repr(entries) if isinstance(entries, str) else "{" + ", ".join(map(repr, sorted(entries))) + "}"


def _example_pattern(word: str, names: list[str]) -> str:
    ending = next((n for n in names if is_named(word, n)), None)
    return repr(rf".*\.{word}" if ending and ending != word else ".*_proj")


def _near(entry: str, names: list[str]) -> str:
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return nearest(entry.rpartition(".")[2], endings)


def _examples(words: list[str], names: list[str]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    last = [word.rpartition(".")[2] for word in words]
    near = list(dict.fromkeys(m for w in last for m in difflib.get_close_matches(w, endings, n=2)))
    examples = near or [name for name in endings if not name.isdigit()][:8] or names[:8]
    return f"{'nearest names' if near else 'the model has, for example'}: {', '.join(examples)}"


def rank_of(target: str, config: LoraConfig) -> int:
    return int(pattern_value(target, dict(config.rank_pattern), config.r))


def alpha_of(target: str, config: LoraConfig) -> float:
    return pattern_value(target, config.alpha_pattern, config.lora_alpha)
