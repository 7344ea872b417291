"""``peft.tuners.lora.variants``."""

from rankfold.lora.variants.bdlora import BlockDiagonalLinear
from rankfold.peft_surface.activated import (
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)

__all__ = [
    "BlockDiagonalLinear",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
]
