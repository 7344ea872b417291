"""``peft.tuners.tuners_utils``."""

from rankfold.lora.layers.base import AdapterLayer as BaseTunerLayer
from rankfold.peft_surface.functional import (
    cast_adapter_dtype,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)
from rankfold.peft_surface.helpers import (
    check_target_module_exists,
    inspect_matched_modules,
)
from rankfold.peft_surface.helpers import (
    include_all_linear_layers as _maybe_include_all_linear_layers,
)
from rankfold.peft_surface.helpers import (
    minimal_target_modules as _find_minimal_target_modules,
)
from rankfold.peft_surface.tuner import LoraModel as BaseTuner

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "_find_minimal_target_modules",
    "_maybe_include_all_linear_layers",
    "cast_adapter_dtype",
    "check_target_module_exists",
    "delete_adapter",
    "inspect_matched_modules",
    "set_adapter",
    "set_requires_grad",
]
