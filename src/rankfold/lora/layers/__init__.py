"""What a layer becomes when it is adapted: each file says for one kind of layer, and registers it."""

from rankfold.lora.layers import attention, conv, embedding, linear, packed, quantised  # noqa: F401
