"""What can be wrong with a LoraConfig, told all at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from rankfold.errors import ConfigError, bullet_list, nearest
from rankfold.lora.config.data_starts import DATA_STARTS
from rankfold.lora.config.variant_configs import VARIANTS

BIASES = ("none", "all", "lora_only")
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "mica")
START = re.compile("|".join((*STARTS, *DATA_STARTS, r"pissa_niter_[0-9]{1,3}")))
MAX_LAYERS = 1000  # of a model with layer_replication
# PEFT options that are carried in the file while unset, and refused by name while rankfold lacks
# them: loading such an adapter as plain LoRA would be silently wrong.
UNSET = {"megatron_config": None, "use_qalora": False}
# Fields of an adapter's config that nothing here acts on: no class or module that they name is imported.
CARRIED_TYPES: dict[str, type] = {
    **dict.fromkeys(("base_model_name_or_path", "megatron_core", "peft_version", "revision"), str),
    "auto_mapping": dict,
    "qalora_group_size": int,
}


def problems_of(config: Any, task_types: Sequence[str]) -> list[str]:
    """Everything that is wrong with the values of a LoraConfig; PEFT's own words are part of the texts."""
    found = [
        text
        for name, (holds, wanted) in FIELDS.items()
        if (value := getattr(config, name)) is not None and not holds(value)
        for text in [f"{name} must be {wanted}, got {value!r:.200}"]
    ]
    found += [f"{n} must be {FIELDS[n][1]}, got None" for n in REQUIRED if getattr(config, n) is None]
    if config.use_dora is True and config.megatron_config:
        found.append("DoRA does not support megatron_core, please set `use_dora=False`.")
    found += [
        f"{name}={value!r} is not supported by this version of rankfold; leave it out"
        for name, default in UNSET.items()
        if (value := getattr(config, name)) != default and value is not None
    ]
    if config.task_type is not None and config.task_type not in task_types:
        found.append(
            f"Invalid task type: '{config.task_type}'. Must be one of the following task types: "
            f"{', '.join(task_types)}.{nearest(str(config.task_type), task_types)}"
        )
    return [*found, *_together(config)]


def _together(config: Any) -> list[str]:
    """What is wrong with values that each are right by themselves."""
    found = []
    if isinstance(config.target_modules, str):
        found += [
            f"`{name}` cannot be used when `target_modules` is a str. Give a list of names, not a pattern"
            for name in ("layers_to_transform", "layers_pattern")
            if getattr(config, name) is not None
        ]
    elif config.layers_pattern and config.layers_to_transform is None:
        found.append("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
    if config.lora_bias is True and not isinstance(config.init_lora_weights, bool):
        found.append(
            "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
            f"init_lora_weights={config.init_lora_weights} instead."
        )
    if config.lora_bias is True and config.use_dora is True:
        found.append("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        found.append("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if sum(getattr(config, name) not in (None, False) for name in ("use_dora", *VARIANTS)) > 1:
        found.append(f"{', '.join(('use_dora', *VARIANTS))} are variants, of which one may be used")
    ranges = config.layer_replication or ()
    if _is_ranges(ranges) and (layers := sum(end - start for start, end in ranges)) > MAX_LAYERS:
        found.append(f"layer_replication makes {layers:,} layers; no model has that many")
    return found


def check_carried(options: dict[str, Any]) -> None:
    """Raise ConfigError for a field that is carried along unused and is not of the type PEFT writes."""
    wrong = [
        f"{name} must be {kind.__name__}, got {options[name]!r:.200}"
        for name, kind in CARRIED_TYPES.items()
        if options.get(name) is not None and type(options[name]) is not kind
    ]
    if wrong:
        raise ConfigError(bullet_list("this adapter config cannot be meant:", wrong))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_start(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and START.fullmatch(value) is not None)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, set)) and all(isinstance(name, str) and name for name in value)


def _is_name_or_names(value: object) -> bool:
    return _is_names(value) or (isinstance(value, str) and value != "")


def _is_layers(value: object) -> bool:
    return all(map(_is_count, value)) if isinstance(value, (list, tuple)) else _is_count(value)


def _is_indices(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(_is_indices, value.values()))
    if not isinstance(value, list) or not value or not all(map(_is_count, value)):
        return False
    return len(set(value)) == len(value)


def _is_ranges(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == len(("start", "end"))
        and all(map(_is_count, pair))
        and pair[0] < pair[1]
        for pair in value
    )


def _pattern_of(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(k, str) and valid(v) for k, v in value.items())
    )


Check = tuple[Callable[[Any], bool], str]
FIELDS: dict[str, Check] = {
    "r": (_is_rank, "a whole number: `r` should be a positive integer value"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "rank_pattern": (_pattern_of(_is_rank), "module patterns with ranks, whole numbers of at least 1"),
    "alpha_pattern": (_pattern_of(_is_number), "a dictionary of module patterns with finite numbers"),
    "bias": (lambda value: value in BIASES, f"one of {', '.join(map(repr, BIASES))}"),
    "init_lora_weights": (
        _is_start,
        f"True, False, {', '.join(map(repr, (*STARTS, *DATA_STARTS)))} or 'pissa_niter_[number]' in this "
        "version",
    ),
    "target_modules": (
        lambda value: value == "" or _is_name_or_names(value),
        "a list of names, or a pattern",
    ),
    "exclude_modules": (_is_name_or_names, "a list of names, or a pattern"),
    "layers_pattern": (
        lambda value: value == "" or _is_name_or_names(value),
        "a list of names, or a pattern",
    ),
    "target_parameters": (_is_names, "names: `target_parameters` must be a list of strings or None."),
    "modules_to_save": (_is_names, "a list of names"),
    "alora_invocation_tokens": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_count, value)),
        "a list of token ids",
    ),
    "layers_to_transform": (_is_layers, "layer numbers from 0"),
    "layer_replication": (_is_ranges, "ranges of layers [[start, end], ...]"),
    "trainable_token_indices": (
        _is_indices,
        "different whole numbers from 0, as a list or as {module name: list}",
    ),
    **dict.fromkeys(
        ("inference_mode", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"),
        (_is_bool, "True or False"),
    ),
}
REQUIRED = ("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern")
