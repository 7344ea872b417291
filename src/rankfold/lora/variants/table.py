"""Which variant a config asks for."""

from __future__ import annotations

from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.variants.activated import ACTIVATED
from rankfold.lora.variants.arrow import ARROW
from rankfold.lora.variants.arrow import HELD as ROUTERS
from rankfold.lora.variants.bdlora import BDLORA
from rankfold.lora.variants.kasa import HELD as DIAGONALS
from rankfold.lora.variants.kasa import KASA
from rankfold.lora.variants.monteclora import HELD as SAMPLERS
from rankfold.lora.variants.monteclora import MONTECLORA
from rankfold.lora.variants.variant import Variant
from rankfold.lora.variants.velora import HELD as PROJECTIONS
from rankfold.lora.variants.velora import VELORA

# By the field of LoraConfig that switches it on.
TABLE: dict[str, Variant] = {
    "velora_config": VELORA,
    "monteclora_config": MONTECLORA,
    "kasa_config": KASA,
    "use_bdlora": BDLORA,
    "arrow_config": ARROW,
    "alora_invocation_tokens": ACTIVATED,
}
# What the layers hold by an adapter's name for them.
HELD = (PROJECTIONS, SAMPLERS, DIAGONALS, ROUTERS)


def variant_of(config: LoraConfig) -> tuple[str, Variant] | None:
    """The field that is set, of which there is one at most, and its variant."""
    return next(((name, TABLE[name]) for name in TABLE if getattr(config, name)), None)
