"""What can be wrong with a LoraConfig, told all at once."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rankfold.errors import ConfigError, nearest
from rankfold.lora.config.data_starts import DATA_STARTS, CordaConfig, EvaConfig, LoftQConfig, sub_config
from rankfold.lora.config.lora_config import UNSET, LoraConfig, TaskType, changes_base

BIASES = ("none", "all", "lora_only")
STARTS = ("gaussian", "orthogonal", "pissa", "olora")
MAX_LAYERS = 1000  # of a model with layer_replication


def read_sub_configs(config: LoraConfig) -> list[str]:
    """Give ``config`` its own copy of each sub-config, as PEFT keeps it, and say what is wrong with them."""
    problems = []
    for start, (name, kind) in DATA_STARTS.items():
        given = getattr(config, name)
        if given is None and config.init_lora_weights == start and kind in (EvaConfig, CordaConfig):
            given = {}  # PEFT fills in the defaults of these two
        if given is None or (kind is LoftQConfig and given == {}):
            continue
        try:
            read: Any = sub_config(kind, given)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        if kind is LoftQConfig:  # PEFT keeps this one as the dictionary that was given
            read = dict(given) if isinstance(given, dict) else asdict(read)
        setattr(config, name, read)
    return problems


def problems_of(config: LoraConfig) -> list[str]:
    problems = [*_wrong_numbers(config), *_wrong_names(config), *_wrong_extras(config)]
    for name, default in UNSET.items():
        value = getattr(config, name)
        if value != default and value is not None:
            problems.append(f"{name}={value!r} is not supported by this version of rankfold; leave it out")
    problems += _wrong_replication(config.layer_replication)
    if config.peft_type != "LORA":
        problems.append(f"peft_type must be 'LORA', got {config.peft_type!r}")
    problems += _wrong_start(config)
    by_name = isinstance(config.target_modules, (list, set))
    if not by_name and config.target_modules is not None and config.layers_to_transform is not None:
        problems.append("layers_to_transform needs target_modules as a list of names, not a pattern")
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("layers_pattern needs layers_to_transform beside it")
    return problems


def _wrong_numbers(config: LoraConfig) -> list[str]:
    problems = []
    if not _is_rank(config.r):
        problems.append(f"r (rank) must be a whole number of at least 1, got {config.r!r}")
    if not _is_alpha(config.lora_alpha):
        problems.append(f"lora_alpha must be a finite number above 0, got {config.lora_alpha!r}")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        problems.append(f"lora_dropout must be a number from 0 to below 1, got {config.lora_dropout!r}")
    for name, valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = getattr(config, name)
        if not isinstance(pattern, dict):
            problems.append(f"{name} must map module patterns to numbers, got {pattern!r}")
            continue
        problems += [f"{name}[{k!r}] is out of range: {v!r}" for k, v in pattern.items() if not valid(v)]
    return problems


def _wrong_names(config: LoraConfig) -> list[str]:
    problems = []
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        names = list(value) if isinstance(value, (list, set, tuple)) else [value]
        if value is not None and not all(isinstance(n, str) and n for n in names):
            problems.append(f"{name} must be a name, a list of names or a pattern, got {value!r}")
    parameters = config.target_parameters
    if parameters is not None and not (
        isinstance(parameters, (list, set, tuple)) and all(isinstance(n, str) and n for n in parameters)
    ):
        problems.append(f"target_parameters must be a list of names, got {parameters!r}")
    indices = config.layers_to_transform
    listed = indices if isinstance(indices, list) else [indices]
    if indices is not None and not all(_is_count(index) for index in listed):
        problems.append(f"layers_to_transform must be layer numbers from 0, got {indices!r}")
    for name in (
        "inference_mode",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "ensure_weight_tying",
    ):
        if not isinstance(getattr(config, name), bool):
            problems.append(f"{name} must be True or False, got {getattr(config, name)!r}")
    types = [t.value for t in TaskType]
    if config.task_type is not None and config.task_type not in types:
        near = nearest(str(config.task_type), types)
        problems.append(f"task_type must be one of {types}, got {config.task_type!r}{near}")
    return problems


def _wrong_start(config: LoraConfig) -> list[str]:
    start, problems = config.init_lora_weights, []
    names = (*STARTS, *DATA_STARTS)
    if not isinstance(start, bool) and start not in names and not changes_base(start):
        problems.append(
            f"init_lora_weights must be True, False, {', '.join(map(repr, names))} or "
            f"'pissa_niter_[number]' in this version, got {start!r}"
        )
    elif config.lora_bias is True and not isinstance(start, bool):
        problems.append(f"lora_bias needs init_lora_weights True or False, got {start!r}")
    if config.lora_bias is True and config.use_dora is True:
        problems.append("lora_bias and use_dora exclude each other, as in PEFT")
    return problems


def _wrong_replication(wanted: object) -> list[str]:
    if wanted is None or wanted == []:
        return []
    ranges = wanted if isinstance(wanted, list) else []
    if not ranges or not all(_is_range(pair) for pair in ranges):
        return [f"layer_replication must be ranges of layers [[start, end], ...], got {wanted!r:.200}"]
    if (layers := sum(end - start for start, end in ranges)) > MAX_LAYERS:
        return [f"layer_replication makes {layers:,} layers; no model has that many"]
    return []


def _is_range(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == len(("start", "end"))
        and all(_is_count(number) for number in value)
        and value[0] < value[1]
    )


def _wrong_extras(config: LoraConfig) -> list[str]:
    problems = []
    if config.bias not in BIASES:
        problems.append(f"bias must be one of {', '.join(map(repr, BIASES))}, got {config.bias!r}")
    saved = config.modules_to_save
    if saved is not None and not (isinstance(saved, list) and all(isinstance(n, str) and n for n in saved)):
        problems.append(f"modules_to_save must be a list of names, got {saved!r}")
    wanted = config.trainable_token_indices
    lists = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    if wanted is not None and not (lists and all(_is_indices(indices) for indices in lists)):
        problems.append(
            "trainable_token_indices must be different whole numbers from 0, as a list or as "
            f"{{module name: list}}, got {wanted!r}"
        )
    return problems


def _is_indices(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(_is_count(index) for index in value):
        return False
    return len(set(value)) == len(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_alpha(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]
