"""What PEFT's starts from data are told: read, checked and written here, run in a later version.

Each class has the name, the fields and the defaults of PEFT 0.21.2's.  A path in one is text: nothing here
opens it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rankfold.errors import ConfigError, nearest

Limits = Mapping[str, tuple[float, float]]
Choices = Mapping[str, tuple[str, ...]]


@dataclass
class SubConfig:
    """Checks its fields by their defaults' types.  Raises ConfigError listing all that cannot be meant."""

    limits: ClassVar[Limits] = {}
    choices: ClassVar[Choices] = {}
    words: ClassVar[Mapping[str, str]] = {}  # PEFT's, for some fields

    def __post_init__(self) -> None:
        problems = [text for field in dataclasses.fields(self) for text in self._wrong(field)]
        if problems:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(problems)}")

    def _wrong(self, field: dataclasses.Field[Any]) -> list[str]:
        value, name = getattr(self, field.name), field.name
        low, high = self.limits.get(name, (-math.inf, math.inf))
        if name in self.choices:
            fits, wanted = value in self.choices[name], f"one of {', '.join(self.choices[name])}"
        elif field.default is None:
            fits, wanted = value is None or isinstance(value, str), "a path or None"
        elif isinstance(field.default, bool):
            fits, wanted = isinstance(value, bool), "True or False"
        else:
            kinds = (int,) if isinstance(field.default, int) else (int, float)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            fits = number and math.isfinite(value) and low <= value <= high
            wanted = "a whole number" if kinds == (int,) else "a number"
            wanted += f" of at least {low:g}" if low > -math.inf else ""
            wanted += f" and at most {high:g}" if high < math.inf else ""
        own = self.words.get(name)
        text = own.format(value) if own else f"{name} must be {wanted}, got {value!r:.200}"
        return [] if fits else [text]


@dataclass
class LoftQConfig(SubConfig):
    """Quantisation that the factors make up for; Li et al. 2023, arXiv 2310.08659."""

    limits: ClassVar[Limits] = {"loftq_bits": (1, 16), "loftq_iter": (1, 1000)}

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig(SubConfig):
    """Principal directions of the layers' inputs; Paischer et al. 2024, arXiv 2410.07170."""

    limits: ClassVar[Limits] = {"rho": (1, math.inf), "tau": (0, 1)}

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class CordaConfig(SubConfig):
    """Directions by the covariance of the layers' inputs; Yang et al. 2024, arXiv 2406.05223."""

    choices: ClassVar[Choices] = {"corda_method": ("ipm", "kpm")}

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig(SubConfig):
    """Directions of the first gradient; Wang et al. 2024, arXiv 2407.05000."""

    choices: ClassVar[Choices] = {
        "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
        "scale": ("stable", "weight_svd", "gd_scale", "unit"),
    }
    limits: ClassVar[Limits] = {"stable_gamma": (1, math.inf)}

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16


@dataclass
class VeloraConfig(SubConfig):
    """What is kept of A's input for its gradient; Miles et al. 2024, arXiv 2405.17991."""

    choices: ClassVar[Choices] = {"init_type": ("batch_average", "batch_average_once", "random")}
    limits: ClassVar[Limits] = {"num_groups": (1, math.inf), "scale": (1e-30, math.inf)}
    words: ClassVar[Mapping[str, str]] = {
        "num_groups": "`num_groups` should be positive, got {0}.",
        "scale": "`scale` should be positive, got {0}.",
        "init_type": "Unsupported `init_type` {0!r}. Supported values are 'batch_average_once', "
        "'batch_average', and 'random'.",
    }

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"


@dataclass
class MontecloraConfig(SubConfig):
    """Noise of a learned variance on A; PEFT 0.21.2's fields."""

    limits: ClassVar[Limits] = {
        "num_samples": (1, math.inf),
        "dirichlet_prior": (1e-30, math.inf),
        "buffer_size": (1, math.inf),
    }

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150  # of draws that PEFT makes in advance; it changes nothing here


# The fields of LoraConfig that switch a variant of training on.
VARIANTS: dict[str, type[SubConfig]] = {"velora_config": VeloraConfig, "monteclora_config": MontecloraConfig}
# By the value of init_lora_weights, the field of LoraConfig that belongs to it and that field's class.
# LoftQ looks at no data, but comes with the others.
DATA_STARTS: dict[str, tuple[str, type[SubConfig]]] = {
    "loftq": ("loftq_config", LoftQConfig),
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}


def sub_config(kind: type[SubConfig], given: object) -> SubConfig:
    """``given``, a dictionary of options or an object of ``kind`` or of PEFT's class of that name, as a
    ``kind`` of its own.  Raises ConfigError."""
    if dataclasses.is_dataclass(given) and type(given).__name__ == kind.__name__:
        given = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{kind.__name__}: it must be one, or a dictionary of its options, got {given!r:.200}"
        )
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [f"unknown option {name!r}{nearest(str(name), known)}" for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{kind.__name__}: {'; '.join(unknown)}")
    return kind(**given)


def read_sub_configs(config: Any) -> list[str]:
    """Give ``config`` its own copy of each sub-config, as PEFT keeps it, and say what is wrong with them.

    One that its ``init_lora_weights`` has no use for is told; PEFT drops that of LoftQ."""
    problems = []
    wanted: dict[str, tuple[str | None, type[SubConfig]]] = {n: (None, kind) for n, kind in VARIANTS.items()}
    wanted |= {name: (start, kind) for start, (name, kind) in DATA_STARTS.items()}
    for name, (start, kind) in wanted.items():
        given = getattr(config, name)
        if start is not None:
            given = _given_for(start, name, kind, config)
        if given is None or (kind is LoftQConfig and given == {}):
            setattr(config, name, given)
            continue
        try:
            read: Any = sub_config(kind, given)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        if kind is LoftQConfig:  # PEFT keeps this one as the dictionary that was given
            read = dict(given) if isinstance(given, dict) else dataclasses.asdict(read)
        setattr(config, name, read)
    return problems


def _given_for(start: str, name: str, kind: type[SubConfig], config: Any) -> Any:
    """What ``config`` has for a start from data, with PEFT's defaults where the start is asked for."""
    given, used = getattr(config, name), config.init_lora_weights == start
    if given and not used:
        warnings.warn(
            f"`{name}` specified but will be ignored when `init_lora_weights` is not {start!r}.", stacklevel=6
        )
        return {} if kind is LoftQConfig else given
    if given is None and used and kind in (EvaConfig, CordaConfig):
        warnings.warn(
            f"`init_lora_weights` is {start!r} but `{name}` is not specified. Using its defaults.",
            stacklevel=6,
        )
        return {}
    return given


def start_from_data(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` can be loaded, and not yet be begun with."""
    return isinstance(start, str) and start in DATA_STARTS
