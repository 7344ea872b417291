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
from rankfold.lora.config.data_starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from rankfold.lora.config.strict_json import CARRIED_TYPES, read_json_object

CONFIG_NAME = "adapter_config.json"
# The PEFT release whose file format is written; PEFT warns when a file names a newer one than itself.
PEFT_VERSION = "0.21.2"
ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
PISSA = re.compile(r"pissa(?:_niter_([0-9]{1,3}))?")
MAX_CONFIG_BYTES = 10_000_000

# PEFT options that are carried in the file while unset, and refused by name while rankfold lacks
# them: loading such an adapter as plain LoRA would be silently wrong.
UNSET: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
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
    loftq_config: dict[str, Any] | LoftQConfig = field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | list[list[int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        from rankfold.lora.config.checks import problems_of, read_sub_configs

        problems = [*read_sub_configs(self), *problems_of(self)]
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
        return cls.from_dict(read_json_object(path, MAX_CONFIG_BYTES), str(path))

    @classmethod
    def from_dict(cls, options: dict[str, Any], where: str) -> LoraConfig:
        """The config of the JSON object ``options``, found in ``where``.  Raises AdapterError as
        ``from_pretrained`` does."""
        if options.get("peft_type") != "LORA":
            got = options.get("peft_type")
            mlx = (
                "; it is mlx's: rankfold convert ADAPTER OUT --layout hf"
                if "lora_parameters" in options
                else ""
            )
            raise AdapterError(
                f"{where} does not describe a LoRA adapter: peft_type is {got!r}, not 'LORA'{mlx}"
            )
        options.pop("runtime_config", None)
        try:
            check_carried(options)
            return cls(**options)
        except ConfigError as error:
            raise AdapterError(f"{where}: {error}") from error


def check_carried(options: dict[str, Any]) -> None:
    """Raise ConfigError for a field that is carried along unused and is not of the type PEFT writes."""
    wrong = [
        f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {options[name]!r:.200}"
        for name, kinds in CARRIED_TYPES.items()
        if options.get(name) is not None and type(options[name]) not in kinds
    ]
    if wrong:
        raise ConfigError(bullet_list("this adapter config cannot be meant:", wrong))


def changes_base(start: bool | str) -> bool:
    """Whether a value of ``init_lora_weights`` takes a part of the base weight into the factors."""
    return isinstance(start, str) and (start == "olora" or PISSA.fullmatch(start) is not None)
