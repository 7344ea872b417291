"""What PEFT's starts from data are told.

Each class has the name, the fields and the defaults of PEFT 0.21.2's.  A path in one is text: nothing here
opens it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rankfold.lora.config.sub_config import Choices, Limits, SubConfig


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
    words: ClassVar[Mapping[str, str]] = {
        "rho": "`rho` must be >= 1.0, got {0!r:.200}",
        "tau": "`tau` must be between 0.0 and 1.0. Got {0!r:.200}",
    }

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


def start_from_data(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` is one of ``DATA_STARTS``."""
    return isinstance(start, str) and start in DATA_STARTS
