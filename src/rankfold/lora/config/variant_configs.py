"""What PEFT's variants of LoRA are told.

Each class has the name, the fields and the defaults of PEFT 0.21.2's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rankfold.errors import ConfigError
from rankfold.lora.config.sub_config import Choices, Limits, SubConfig


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


@dataclass
class KasaConfig(SubConfig):
    """Singular values as a factor of their own; Wang et al. 2024, arXiv 2412.06071.  ``beta`` and ``gamma``
    weigh the terms that ``_get_kasa_loss`` gives."""

    limits: ClassVar[Limits] = {"beta": (0, math.inf), "gamma": (0, math.inf)}
    words: ClassVar[Mapping[str, str]] = {
        "beta": "`beta` must be non-negative, got {0}.",
        "gamma": "`gamma` must be non-negative, got {0}.",
    }

    beta: float = 1e-4
    gamma: float = 1e-3


@dataclass
class BdLoraConfig(SubConfig):
    """Factors of blocks, which machines that share a layer need not exchange; Konstantinidis et al. 2025.

    A module whose name holds a text of ``target_modules_bd_a`` has a block-diagonal A, one of
    ``target_modules_bd_b`` a block-diagonal B; others are an error unless ``match_strict`` is False."""

    limits: ClassVar[Limits] = {"nblocks": (1, math.inf)}
    names: ClassVar[tuple[str, ...]] = ("target_modules_bd_a", "target_modules_bd_b")

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if both := sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())}):
            raise ConfigError(f"Found overlapping modules in target_modules_bd lists: {', '.join(both)}")


@dataclass
class ArrowConfig(SubConfig):
    """Adapters chosen for each token; Ostapenko et al. 2024, arXiv 2405.11157.  With ``use_gks`` the mean of
    general adapters is taken off each first."""

    limits: ClassVar[Limits] = {"top_k": (1, math.inf), "router_temperature": (1e-30, math.inf)}
    words: ClassVar[Mapping[str, str]] = {
        "top_k": "top_k cannot be negative.",
        "router_temperature": "router_temperature must be greater than 0.",
    }
    names: ClassVar[tuple[str, ...]] = ("task_adapter_names", "gks_adapter_names")
    counts: ClassVar[tuple[str, ...]] = ("rng_seed",)

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None  # of PEFT's power iteration; the direction is exact here


# The fields of LoraConfig that switch a variant on, of which one may be, with the class of their value.
VARIANTS: dict[str, type[SubConfig] | None] = {
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "kasa_config": KasaConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "alora_invocation_tokens": None,
}
# Those after which an adapter is no product of two factors that is added to the weight, and why not.
NOT_PLAIN = {
    "kasa_config": "KaSA changes the base and has a third factor",
    "use_bdlora": "BD-LoRA keeps the blocks of a factor",
    "arrow_config": "an Arrow router is no factors but a choice among other adapters",
    "alora_invocation_tokens": "an activated LoRA counts after its invocation only",
}


def not_plain(config: Any) -> list[str]:
    """Why the factors in the file of an adapter are not all that it is."""
    return [text for name, text in NOT_PLAIN.items() if getattr(config, name)]
