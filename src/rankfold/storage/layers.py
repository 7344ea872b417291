"""``nn.Linear`` and ``nn.Embedding`` whose weight is held in few bytes.

A layer is turned into one in place, by changing its class, so it stays the object that it was.  ``weight``
is then the held bytes, uint8 (rows, bytes of a row), frozen, as bitsandbytes' layers have theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import ModelError
from rankfold.kernels.few_rows import linear
from rankfold.storage.forms import Form, expanded, numbers_at
from rankfold.storage.product import held_linear, held_transposed


class HeldLayer(nn.Module):
    """What both have in common; ``form`` says how ``weight`` is to be read."""

    form: Form
    numbers_like: Tensor  # a buffer without numbers, whose dtype model.to(dtype) changes

    @property
    def columns(self) -> int:
        """The numbers of a row."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of the weight as numbers."""
        return len(self.held), self.columns

    @property
    def held(self) -> nn.Parameter:
        """The bytes, (rows, bytes of a row)."""
        return cast(nn.Parameter, self._parameters["weight"])

    def expanded_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers of the weight, (rows, columns), in memory of their own."""
        return expanded(self.held.detach(), self.form, self.columns, dtype)

    def numbers_at(self, flat: Tensor) -> Tensor:
        """The numbers at places of the flattened weight, float32, without expanding the others."""
        rows, places = flat // self.columns, flat % self.columns
        return numbers_at(self.held.detach(), self.form, self.columns, rows, places)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, held={self.form.name}"


class HeldLinear(HeldLayer, nn.Linear):
    """``x W^T + bias``, where W is expanded for each product, in forward and in backward."""

    @property
    def columns(self) -> int:
        return self.in_features

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``: x (..., columns) -> (..., rows)."""
        x, wide = _for_products(x), self.__dict__.get("wide")
        if wide is not None and wide.dtype == x.dtype and not torch.is_grad_enabled():
            return linear(x, wide)
        return held_linear(x, self.held, self.form)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """``grad W``: grad (..., rows) -> (..., columns)."""
        return held_transposed(grad, self.held, self.form, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        bias = self._parameters.get("bias")
        return out if bias is None else out + bias.to(out.dtype)


def _for_products(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast computes products in, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class HeldEmbedding(HeldLayer, nn.Embedding):
    """Rows of W, of which only those that are asked for are expanded."""

    @property
    def columns(self) -> int:
        return self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids.reshape(-1), self.held)
        numbers = expanded(rows, self.form, self.columns, self.numbers_like.dtype)
        return numbers.view(*ids.shape, self.columns)


@contextmanager
def expanded_meanwhile(layers: Iterable[HeldLinear]) -> Iterator[None]:
    """Within the block ``layers`` have their numbers at hand, in float32, for products without gradients."""
    layers = list(layers)
    for layer in layers:
        layer.__dict__["wide"] = layer.expanded_weight()
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["wide"]


HELD_CLASSES: dict[type[nn.Module], type[HeldLayer]] = {nn.Linear: HeldLinear, nn.Embedding: HeldEmbedding}


def can_hold(layer: nn.Module) -> bool:
    """Whether ``hold`` can be asked to: subclasses may read ``weight`` as the numbers it no longer is."""
    return type(layer) in HELD_CLASSES and getattr(layer, "max_norm", None) is None


def hold(layer: nn.Module, form: Form, held: Tensor) -> HeldLayer:
    """Turn ``layer``, an ``nn.Linear`` or ``nn.Embedding``, perhaps on the meta device, into one that holds
    its weight as ``held``, in place.  A Parameter given for several layers is shared by them.

    Raises ModelError if ``held`` is not of the layer's shape in ``form``."""
    if not can_hold(layer):
        raise ModelError(f"a {type(layer).__name__} cannot hold its weight as {form.name}")
    rows, columns = cast(Tensor, layer.weight).shape
    form.check(held, columns)
    if len(held) != rows:
        raise ModelError(f"the weight of {layer} has {rows} rows; got {len(held)} held as {form.name}")
    parameter = held if isinstance(held, nn.Parameter) else nn.Parameter(held, requires_grad=False)
    layer._parameters["weight"] = parameter
    layer.__class__ = HELD_CLASSES[type(layer)]
    layer.__dict__["form"] = form
    layer.register_buffer("numbers_like", torch.empty(0, device=held.device), persistent=False)
    return cast(HeldLayer, layer)


def release(layer: HeldLayer, weight: nn.Parameter) -> None:
    """Take from ``layer`` what ``hold`` gave it but for its class, and give it ``weight`` (rows, columns)."""
    layer._parameters["weight"] = weight
    del layer.__dict__["form"], layer._buffers["numbers_like"]
    layer._non_persistent_buffers_set.discard("numbers_like")


def held_layers(model: nn.Module) -> dict[str, HeldLayer]:
    """The layers of ``model`` that hold their weight in few bytes, by dotted name."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, HeldLayer)}
