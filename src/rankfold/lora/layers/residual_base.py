"""Starts that take a part of the base weight W into the factors and leave the residual W - s B A, or another.

They are listed in ``starts.parts``.  The layer then keeps both weights, which costs the size of the weight:
the residual lies in ``weight`` while the adapter is applied, the original otherwise, in the buffer
``spare_weight`` the other of the two.  So a disabled, deleted or unloaded adapter leaves the base that was
there, to the bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.lora.layers.base import AdapterLayer, AdapterSpec
from rankfold.lora.starts.parts import parts_of

SPLITTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Split:
    """That the starts of the adapters ``names`` split the base weight, all in the one way ``kind``; whether
    the residual is in place now."""

    names: list[str]
    kind: str
    in_place: bool = False


class ResidualBase(AdapterLayer):
    """A layer whose base weight one adapter may split."""

    added: ClassVar[tuple[str, ...]] = ("split", *AdapterLayer.added)

    split: Split | None  # set while an adapter's start has changed the base weight

    def start(self) -> None:
        super().start()
        self.__dict__["split"] = None

    def end(self) -> None:
        if self.split is not None:
            if self.merged:
                self._drop_spare()
            else:
                self.end_split()
        super().end()

    def refresh(self) -> None:
        super().refresh()
        if self.split is not None and not self.merged:
            self._place_base(residual=not {*self.split.names}.isdisjoint(self.applied))

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        raise NotImplementedError

    def base_weight_for(self, names: Collection[str]) -> Tensor:
        """The base weight that the adapters ``names`` are added to: the residual, if one of them split
        the base weight, else the original."""
        if self.split is None or {*self.split.names}.isdisjoint(names) != self.split.in_place:
            return self.base_weight()
        return cast(Tensor, self.spare_weight)

    @torch.no_grad()
    def split_base(self, spec: AdapterSpec) -> None:
        """Take the start's part of the base weight into the factors and keep the residual beside the base.

        All of it is worked out in float32 (float64 for a float64 base); the residual is rounded once.  The
        factors are not rounded to a half-precision base's dtype on the way, as PEFT's are."""
        weight = self.base_weight().detach()
        transposed = self.row_dim == 1
        matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
        matrix = matrix.T if transposed else matrix
        parts = parts_of(self, matrix, spec)
        whole = (
            matrix - spec.scale * parts.lora_b @ parts.lora_a if parts.residual is None else parts.residual
        )
        for parameter, value in zip(self.factors(spec.name), (parts.lora_a, parts.lora_b), strict=True):
            parameter.copy_(value)
        residual = whole.to(weight.dtype)
        kind = "" if parts.residual is None else str(spec.config.init_lora_weights)
        self.keep_residual(spec.name, residual.T if transposed else residual, kind)

    def keep_residual(self, name: str, residual: Tensor, kind: str = "") -> None:
        """Let ``residual``, in the base weight's shape and dtype, be the base of adapter ``name``."""
        self.register_buffer("spare_weight", residual.contiguous(), False)
        self.split = Split([name], kind)

    def end_split_of(self, name: str) -> None:
        """Forget that the start of one adapter split the base weight."""
        if self.split is not None and name in self.split.names:
            self.split.names.remove(name)
            if not self.split.names:
                self.end_split()

    def _place_base(self, *, residual: bool) -> None:
        """Put the residual or the original of a split base weight where the layer computes with it.

        The tensors change places, so nothing is copied or rounded.  Under a merge, what ``unmerge`` will
        bring back is exchanged instead."""
        split = cast(Split, self.split)
        if split.in_place == residual:
            return
        spare = cast(Tensor, self._buffers["spare_weight"])
        if self.merged:
            self._originals["weight"], spare = spare, self._originals["weight"]
        else:
            weight = cast(nn.Parameter, self._parameters["weight"])
            weight.data, spare = spare, weight.data
        self._buffers["spare_weight"], split.in_place = spare, residual

    def end_split(self) -> None:
        """Make the original weight the layer's only one."""
        self._place_base(residual=False)
        self._drop_spare()

    def _drop_spare(self) -> None:
        """Forget whichever of the two weights is not in place."""
        del self.spare_weight
        self.split = None


def splitting_problems(layer: nn.Module, spec: AdapterSpec, kind: str = "") -> list[str]:
    """What keeps the start of ``spec`` from taking its part from the weight of ``layer``; that another start
    of the same ``kind``, if it is one, has taken the same part does not."""
    weight, split = cast(nn.Parameter, layer._parameters["weight"]), layer.__dict__.get("split")
    if split is not None and kind and split.kind == kind:
        return []
    if split is not None:
        return [f"the start of {split.names} has changed its base weight already; merge or delete that one"]
    if weight.dtype not in SPLITTABLE:
        return [
            "Please initialize PiSSA, OLoRA, CorDA, LoRA-GA and KaSA under float32, float16, or bfloat16: "
            f"this start changes the base weight, and this one is {weight.dtype}; dequantise it first"
        ]
    if spec.rank > min(weight.shape):
        return [f"rank {spec.rank} exceeds what its weight of {tuple(weight.shape)} can hold"]
    if weight.is_meta or not torch.isfinite(weight).all():
        return ["this start decomposes the base weight, which holds no values, or NaN or infinite ones"]
    return []
