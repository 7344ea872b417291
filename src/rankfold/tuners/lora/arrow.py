"""``peft.tuners.lora.arrow``."""

from rankfold.peft_surface.arrow import create_arrow_model
from rankfold.peft_surface.arrow import source_of as _resolve_adapter_source

__all__ = ["_resolve_adapter_source", "create_arrow_model"]
