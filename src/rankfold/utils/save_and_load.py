"""``peft.utils.save_and_load``: PEFT's import path; nothing is defined here."""

from rankfold.peft_surface.functional import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

__all__ = ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
