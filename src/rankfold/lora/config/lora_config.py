"""``LoraConfig``: PEFT's schema and defaults, checked as a whole before anything is built."""

from __future__ import annotations

import enum
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from rankfold.errors import AdapterError, ConfigError, bullet_list, nearest
from rankfold.files import write_whole
from rankfold.lora.config.checks import check_carried, problems_of
from rankfold.lora.config.data_starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from rankfold.lora.config.nested import read_sub_configs
from rankfold.lora.config.strict_json import read_json_object
from rankfold.lora.config.variant_configs import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

CONFIG_NAME = "adapter_config.json"
# The PEFT release whose file format is written; PEFT warns when a file names a newer one than itself.
PEFT_VERSION = "0.21.2"
ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
PISSA = re.compile(r"pissa(?:_niter_([0-9]{1,3}))?")
MAX_CONFIG_BYTES = 10_000_000


class TaskType(enum.StrEnum):
    """What the model is for; the names of PEFT."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The one of PEFT's methods that is here."""

    LORA = "LORA"


@dataclass
class LoraRuntimeConfig:
    """What holds for one process and is never saved.  An adapter is where its base is, so that
    ``ephemeral_gpu_offload`` changes nothing."""

    ephemeral_gpu_offload: bool = False


C = TypeVar("C")


def _named_options(cls: type[C]) -> type[C]:
    """Let a dataclass take ``ALIASES`` and answer an unknown option with the nearest known one."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def checked(self: Any, *values: Any, **options: Any) -> None:
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
        init(self, *values, **options)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the plain assignment
    return cls


@_named_options
@dataclass
class LoraConfig:
    """How to adapt a model; field names, defaults and JSON of PEFT 0.21.2.

    ``rank``, ``alpha`` and ``dropout`` are accepted for ``r``, ``lora_alpha`` and ``lora_dropout``.
    ``target_modules`` is a list of names (a module whose dotted name equals an entry or ends with
    ``.entry``), a regular expression for the whole dotted name, ``"all-linear"`` (every linear layer
    but the output head), or None (the architecture's usual choice).  ``target_parameters`` is a list of
    names of parameters, matched like modules; with it ``target_modules`` may be empty.

    Raises ConfigError naming every wrong field at once.  ``get_peft_model`` does not change a config that
    it is given: the model keeps a copy of its own."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
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
    velora_config: VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | list[list[int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: ArrowConfig | dict[str, Any] | None = None
    kasa_config: KasaConfig | dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    # Of a file, what is no option here (a newer PEFT wrote it) and is not empty: see ``from_dict``.
    unknown_options: ClassVar[dict[str, Any] | None] = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        self.peft_version = PEFT_VERSION if self.peft_version is None else self.peft_version
        for name in ("target_modules", "exclude_modules"):  # PEFT's form of a list
            if isinstance(value := getattr(self, name), (list, tuple, frozenset)):
                setattr(self, name, set(value) if all(isinstance(n, str) for n in value) else value)
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(value := getattr(self, name), (tuple, set, frozenset)):
                setattr(self, name, sorted(value))
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        problems = [*read_sub_configs(self), *problems_of(self, [str(task) for task in TaskType])]
        if problems:
            raise ConfigError(bullet_list("this LoraConfig cannot be used:", problems))
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)
        self._tell()

    def _tell(self) -> None:
        """Warn of what is odd about the values together."""
        if self.alora_invocation_tokens is not None and self.task_type != TaskType.CAUSAL_LM:
            warnings.warn(
                "aLoRA is currently only supported for CAUSAL_LM task: elsewhere pass alora_offsets",
                stacklevel=4,
            )
        patterns = self.rank_pattern or self.alpha_pattern
        if self.use_rslora and patterns and changes_base(self.init_lora_weights):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of "
                "modified base weights: rankfold converts such an adapter "
                "(path_initial_model_for_weight_conversion), PEFT does not",
                stacklevel=4,
            )

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """Adapt layers of the classes in ``mapping`` by turning them into the classes they map to, for this
        config only; ``register_layer`` does it for all."""
        self.__dict__["_custom_modules"] = {**self.custom_modules, **mapping}

    @property
    def custom_modules(self) -> Mapping[type, type]:
        found: Mapping[type, type] = self.__dict__.get("_custom_modules", {})
        return found

    def replaced(self, **changes: Any) -> Self:
        """A copy with other options, of the same custom modules."""
        copy = replace(self, **changes)
        copy._register_custom_module(self.custom_modules)
        return copy

    @property
    def rank(self) -> int:
        return self.r

    @property
    def alpha(self) -> float:
        return self.lora_alpha

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def scale(self, rank: int, alpha: float) -> float:
        """``alpha / rank``; with rsLoRA ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain values, collections of names sorted so that the bytes are reproducible."""
        plain = {
            name: sorted(value) if isinstance(value, set) else value for name, value in asdict(self).items()
        }
        del plain["runtime_config"]
        return plain

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write ``adapter_config.json`` as PEFT does: two spaces, sorted keys, no last newline."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_whole(Path(save_directory) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Read ``adapter_config.json`` of an adapter folder, or of a repository of the hub; ``hub`` are words
        of ``huggingface_hub.hf_hub_download`` (revision, token, cache_dir).

        Raises AdapterError if it is not there, not JSON, or not a LoRA adapter."""
        path = Path(pretrained_model_name_or_path) / (subfolder or "") / CONFIG_NAME
        if not path.is_file():
            path = from_hub(pretrained_model_name_or_path, CONFIG_NAME, subfolder, hub)
        return cls.from_dict(read_json_object(path, MAX_CONFIG_BYTES), str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **_: Any) -> dict[str, Any]:
        """The options in a config file as they stand there.  Raises AdapterError."""
        options = read_json_object(Path(path_json_file), MAX_CONFIG_BYTES)
        options.pop("runtime_config", None)
        return options

    @classmethod
    def from_peft_type(cls, **options: Any) -> Self:
        """``LoraConfig(**options)``.  Raises ConfigError for another method's ``peft_type``."""
        if options.get("peft_type", PeftType.LORA) != PeftType.LORA:
            raise ConfigError(f"peft_type must be 'LORA', got {options['peft_type']!r}")
        return cls(**options)

    @classmethod
    def from_dict(cls, options: dict[str, Any], where: str) -> Self:
        """The config of the JSON object ``options``, found in ``where``.

        Keys that are no options here are told in one warning; those with a value that is not empty are kept
        in ``unknown_options``, because what they say may change what the adapter computes.
        Raises AdapterError as ``from_pretrained`` does."""
        got, mlx = options.get("peft_type"), ""
        if "lora_parameters" in options:
            mlx = "; it is mlx's: rankfold export ADAPTER --to hf --out OUT"
        if got is None and not mlx:
            raise AdapterError(
                f"{where} is no adapter's. The {cls.__name__} config that is trying to be loaded is missing "
                "required keys: {'peft_type'}."
            )
        if got != "LORA":
            raise AdapterError(
                f"{where} does not describe a LoRA adapter: peft_type is {got!r}, not 'LORA'{mlx}"
            )
        known = {f.name for f in fields(cls)} - {"runtime_config"}
        unknown = {key: value for key, value in options.items() if key not in {*known, "runtime_config"}}
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)!r:.500} for class {cls.__name__}, these are "
                f"ignored. A newer PEFT may have written {where}",
                stacklevel=3,
            )
        try:
            check_carried(options)
            config = cls(**{key: value for key, value in options.items() if key in known})
        except ConfigError as error:
            raise AdapterError(f"{where}: {error}") from error
        config.__dict__["unknown_options"] = {key: value for key, value in unknown.items() if value} or None
        return config


def from_hub(repository: str | Path, name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """A file of an adapter that lies in a repository of the hub, downloaded.

    Raises AdapterError if there is no such folder, repository or file."""
    folder = Path(repository) / (subfolder or "")
    missing = AdapterError(
        f"{folder} is not an adapter folder: it holds no {name} (Can't find '{name}' at '{repository}')"
    )
    if Path(repository).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repository)):
        raise missing
    import huggingface_hub

    words = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    asked = {word: hub[word] for word in words if word in hub}
    try:
        return Path(huggingface_hub.hf_hub_download(str(repository), name, subfolder=subfolder, **asked))
    except Exception as error:  # many kinds of its own, and those of its transports
        raise AdapterError(f"{missing}; the hub: {error}") from error


def changes_base(start: bool | str) -> bool:
    """Whether a value of ``init_lora_weights`` takes a part of the base weight into the factors."""
    changing = ("olora", "corda", "lora_ga", "loftq")
    return isinstance(start, str) and (start in changing or PISSA.fullmatch(start) is not None)
