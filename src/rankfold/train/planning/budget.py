"""How many tokens a micro-batch should have: enough that matrix products run at their speed."""

from __future__ import annotations

from typing import Any

import torch

from rankfold.data.order.batches import MICRO_BATCH_TOKENS, micro_batch_tokens
from rankfold.models.base.precision import product_speed

GAIN = 1.1  # by which products of twice the tokens must be faster
MOST = 8 * MICRO_BATCH_TOKENS
LONG_S = 0.03  # a product that takes so long does not get faster


def fast_tokens(model: Any, dtype: torch.dtype) -> int:
    """The fewest tokens, doubled from 1,024 on, at which ``model``'s products in ``dtype`` are as fast as
    they get, memory aside.

    Timed in half precision on a CPU, where only large products keep the units for it busy.  In float32 1,024
    are as fast as more, and a GPU takes what fits."""
    tokens = micro_batch_tokens(model.device)
    if model.device.type != "cpu" or dtype == torch.float32:
        return tokens
    width = model.config.get_text_config().hidden_size
    speed = product_speed(model.device, dtype, (tokens, width, width))
    while tokens < MOST and 2 * tokens * width**2 / speed < LONG_S:
        larger = product_speed(model.device, dtype, (2 * tokens, width, width))
        if larger < GAIN * speed:
            break
        tokens, speed = 2 * tokens, larger
    return tokens
