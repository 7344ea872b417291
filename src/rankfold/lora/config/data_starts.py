"""What PEFT's starts from data are told: read, checked and written here, run in a later version.

Each class has the name, the fields and the defaults of PEFT 0.21.2's.  A path in one is text: nothing here
opens it."""

from __future__ import annotations

import dataclasses
import math
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
        return [] if fits else [f"{name} must be {wanted}, got {value!r:.200}"]


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


def start_from_data(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` can be loaded, and not yet be begun with."""
    return isinstance(start, str) and start in DATA_STARTS
