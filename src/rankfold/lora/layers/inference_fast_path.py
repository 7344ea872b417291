"""The shortest way through a linear layer with one plain adapter, for calls without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

READABLE_DEVICES = ("cpu", "cuda")


class QuickUpdate:
    """Transposed views of one adapter's factors, made once, because making them costs a small layer as
    much as a product does.  They share the factors' memory, so training in place shows in them."""

    __slots__ = ("drops", "dtype", "holders", "name", "pointers", "rank", "transposed_a", "transposed_b")

    def __init__(self, name: str, holders: tuple[dict[str, Any], dict[str, Any]], drops: bool) -> None:
        self.name, self.holders, self.drops = name, holders, drops
        lora_a, lora_b = (holder["weight"].detach() for holder in holders)
        self.rank, self.dtype = lora_a.shape[0], lora_a.dtype
        self.pointers: tuple[int, int] = (lora_a.data_ptr(), lora_b.data_ptr())
        self.transposed_a, self.transposed_b = lora_a.t(), lora_b.t()

    def is_current(self) -> bool:
        """Whether the factors still lie in the memory that the views show, and are as many."""
        holder_a, holder_b = self.holders
        pointer_a, pointer_b = self.pointers
        lora_a: Tensor = holder_a["weight"]
        lora_b: Tensor = holder_b["weight"]
        return (
            lora_a.data_ptr() == pointer_a and lora_b.data_ptr() == pointer_b and lora_a.shape[0] == self.rank
        )

    def add(self, out: Tensor, x: Tensor, scale: float) -> Tensor:
        """``out`` (rows, out), in place, plus ``scale * x A^T B^T``; x (rows, in)."""
        narrow = torch.mm(x, self.transposed_a)
        if scale == 1:  # handing over a factor takes torch nearly half as long as the product
            return out.addmm_(narrow, self.transposed_b)
        return out.addmm_(narrow, self.transposed_b, alpha=scale)


class _Look(QuickUpdate):
    """Stands where nobody has looked yet whether there is a quick way."""

    def __init__(self) -> None:
        pass

    def is_current(self) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return self


LOOK = _Look()


def quick_update(name: str, lora_a: nn.Module, lora_b: nn.Module, drops: bool) -> QuickUpdate | None:
    """A QuickUpdate of ordinary factors, or None where their memory cannot be looked at."""
    # The dictionaries, not the parameters: a loader or a sharding library may exchange those.
    holders = lora_a._parameters, lora_b._parameters
    for weight in (holder["weight"] for holder in holders):
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return None
        if weight.device.type not in READABLE_DEVICES:
            return None
    return QuickUpdate(name, holders, drops)
