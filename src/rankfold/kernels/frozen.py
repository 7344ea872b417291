"""A frozen matrix that is a tensor, or that is there as numbers for its products only."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class FrozenMatrix(Protocol):
    """W (rows, columns) held in another form.  Both products can be differentiated by what is given."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``: x (tokens, columns) -> (tokens, rows)."""

    def transposed_product(self, grad: Tensor) -> Tensor:
        """``grad W``: grad (tokens, rows) -> (tokens, columns)."""


def product(x: Tensor, weight: Tensor | FrozenMatrix, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: x (tokens, columns) -> (tokens, rows)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    out = weight.product(x)
    return out if bias is None else out + bias.to(out.dtype)


def transposed_product(grad: Tensor, weight: Tensor | FrozenMatrix) -> Tensor:
    """``grad W``: grad (tokens, rows) -> (tokens, columns), in the dtype of W if that is a tensor."""
    if isinstance(weight, Tensor):
        return torch.mm(grad.to(weight.dtype), weight)
    return weight.transposed_product(grad)
