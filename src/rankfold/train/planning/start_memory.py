"""What a start holds beside the weights while it looks at rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankfold.errors import ConfigError
from rankfold.lora.starts.eva import MOMENT_BYTES
from rankfold.models.base.memory import free_memory_bytes, free_swap_bytes


def gathered_bytes(start: str, layers: Mapping[str, Any]) -> int:
    """At least, for linear ``layers`` by their paths: gradients like their weights, or second moments
    (in, in) in float32 of their inputs, which layers of one width in one block may share."""
    if start == "lora-ga":
        return sum(int(each.weight.numel() * each.weight.element_size()) for each in layers.values())
    widths = {
        (path.rpartition(".")[0], getattr(layer, "in_features", layer.weight.shape[0]))
        for path, layer in layers.items()
    }
    moments = sum(4 * int(width) ** 2 for _, width in widths)
    return {"corda": moments, "eva": min(moments, MOMENT_BYTES)}.get(start, 0)


def told_gathered(start: str, layers: Mapping[str, Any]) -> list[str]:
    needed = gathered_bytes(start, layers)
    return [f"start={start} holds at least {needed / 1e9:.1f} GB while it looks at rows"] if needed else []


def check_room(start: str, layers: Mapping[str, Any], device: Any) -> None:
    """Raise ConfigError if what ``start`` holds cannot fit beside the weights."""
    needed, free = gathered_bytes(start, layers), free_memory_bytes(device) + free_swap_bytes(device)
    if needed > free:
        raise ConfigError(
            f"start={start} holds at least {needed / 1e9:.1f} GB while it looks at rows, and "
            f"{free / 1e9:.1f} GB are free; name fewer targets, or take start=eva, which holds about "
            f"{MOMENT_BYTES / 1e9:.0f} GB at most, pissa or olora, which look at no rows"
        )
