"""``LoraConfig``: PEFT's schema and defaults, checked as a whole before anything is built."""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from rankfold.errors import AdapterError, ConfigError, bullet_list, nearest
from rankfold.files import write_whole
from rankfold.lora.strict_json import CARRIED_TYPES, read_json_object

CONFIG_NAME = "adapter_config.json"
# The PEFT release whose file format is written; PEFT warns when a file names a newer one than itself.
PEFT_VERSION = "0.21.2"
ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
BIASES = ("none", "all", "lora_only")
STARTS = ("gaussian", "orthogonal", "pissa", "olora")
PISSA = re.compile(r"pissa(?:_niter_([0-9]{1,3}))?")
MAX_CONFIG_BYTES = 10_000_000

# PEFT options that are carried in the file while unset, and refused by name while rankfold lacks
# them: loading such an adapter as plain LoRA would be silently wrong.
UNSET: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}


class TaskType(enum.StrEnum):
    """What the model is for; the names of PEFT."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


C = TypeVar("C")


def _named_options(cls: type[C]) -> type[C]:
    """Let a dataclass take ``ALIASES`` and answer an unknown option with the nearest known one."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def checked(self: Any, **options: Any) -> None:
        known = {f.name for f in fields(self)}
        problems = []
        for alias in ALIASES.keys() & options.keys():
            if ALIASES[alias] in options:
                problems.append(f"{alias} and {ALIASES[alias]} are the same option; give one of them")
            else:
                options[ALIASES[alias]] = options.pop(alias)
        for name in sorted(options.keys() - known - ALIASES.keys()):
            problems.append(f"unknown option {name!r}{nearest(name, known | ALIASES.keys())}")
        if problems:
            raise ConfigError(bullet_list("this LoraConfig cannot be used:", problems))
        init(self, **options)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the plain assignment
    return cls


@_named_options
@dataclass(kw_only=True)
class LoraConfig:
    """How to adapt a model; field names, defaults and JSON of PEFT 0.21.2.

    ``rank``, ``alpha`` and ``dropout`` are accepted for ``r``, ``lora_alpha`` and ``lora_dropout``.
    ``target_modules`` is a list of names (a module whose dotted name equals an entry or ends with
    ``.entry``), a regular expression for the whole dotted name, ``"all-linear"`` (every linear layer
    but the output head), or None (the architecture's usual choice).  ``target_parameters`` is a list of
    names of parameters, matched like modules; with it ``target_modules`` may be empty.

    Raises ConfigError naming every wrong field at once.  Nothing changes a config after it was given
    to ``get_peft_model``: the model keeps a copy of its own."""

    task_type: TaskType | str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = PEFT_VERSION
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError(bullet_list("this LoraConfig cannot be used:", problems))
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)

    @property
    def rank(self) -> int:
        return self.r

    @property
    def alpha(self) -> float:
        return self.lora_alpha

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    def scale(self, rank: int, alpha: float) -> float:
        """``alpha / rank``; with rsLoRA ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain values, collections of names sorted so that the bytes are reproducible."""
        return {
            name: sorted(value) if isinstance(value, set) else value for name, value in asdict(self).items()
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` as PEFT does: two spaces, sorted keys, no last newline."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoraConfig:
        """Read ``adapter_config.json`` of an adapter folder.

        Raises AdapterError if it is not there, not JSON, not a LoRA adapter, or sets what rankfold
        does not know: an option that is dropped would change what the adapter computes."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise AdapterError(f"{folder} is not an adapter folder: it holds no {CONFIG_NAME}")
        options = read_json_object(path, MAX_CONFIG_BYTES)
        if options.get("peft_type") != "LORA":
            got = options.get("peft_type")
            raise AdapterError(f"{path} does not describe a LoRA adapter: peft_type is {got!r}, not 'LORA'")
        options.pop("runtime_config", None)
        try:
            check_carried(options)
            return cls(**options)
        except ConfigError as error:
            raise AdapterError(f"{path}: {error}") from error


def check_carried(options: dict[str, Any]) -> None:
    """Raise ConfigError for a field that is carried along unused and is not of the type PEFT writes."""
    wrong = [
        f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {options[name]!r:.200}"
        for name, kinds in CARRIED_TYPES.items()
        if options.get(name) is not None and type(options[name]) not in kinds
    ]
    if wrong:
        raise ConfigError(bullet_list("this adapter config cannot be meant:", wrong))


def _problems(config: LoraConfig) -> list[str]:
    problems = [*_wrong_numbers(config), *_wrong_names(config), *_wrong_extras(config)]
    for name, default in UNSET.items():
        value = getattr(config, name)
        if value != default and value is not None:
            problems.append(f"{name}={value!r} is not supported by this version of rankfold; leave it out")
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


def changes_base(start: bool | str) -> bool:
    """Whether a value of ``init_lora_weights`` takes a part of the base weight into the factors."""
    return isinstance(start, str) and (start == "olora" or PISSA.fullmatch(start) is not None)


def _wrong_start(config: LoraConfig) -> list[str]:
    start, problems = config.init_lora_weights, []
    if not isinstance(start, bool) and start not in STARTS and not changes_base(start):
        problems.append(
            f"init_lora_weights must be True, False, {', '.join(map(repr, STARTS))} or "
            f"'pissa_niter_[number]' in this version, got {start!r}"
        )
    elif config.lora_bias is True and not isinstance(start, bool):
        problems.append(f"lora_bias needs init_lora_weights True or False, got {start!r}")
    if config.lora_bias is True and config.use_dora is True:
        problems.append("lora_bias and use_dora exclude each other, as in PEFT")
    return problems


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
