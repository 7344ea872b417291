"""One layer's output for a batch whose rows belong to several adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rankfold.errors import ConfigError
from rankfold.kernels.grouped_low_rank import Groups, Stack, add_grouped_update, stacked
from rankfold.lora.layers.base import AdapterLayer, upcast
from rankfold.lora.layers.linear import FUSED_CLASSES, FusedUpdates, LinearUpdates
from rankfold.lora.variants.activated import OFFSETS


class MixedRows:
    """Which adapter each row of a batch is of, ``None`` for none: ``names``, which may be set anew, all among
    ``carried``.  What a layer needs of that is made once for all layers that carry the same adapters."""

    def __init__(self, carried: Collection[str], names: Sequence[str | None] = ()) -> None:
        self.carried = tuple(carried)
        self._names: list[str | None] = list(names)
        self._groups: dict[tuple[tuple[str, ...], torch.device], Groups] = {}

    @property
    def names(self) -> list[str | None]:
        return self._names

    @names.setter
    def names(self, names: Sequence[str | None]) -> None:
        if names != self._names:
            self._names = list(names)
            self._groups.clear()

    def check(self, rows: int) -> None:
        if rows != len(self.names):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {rows} respectively."
            )

    def groups(self, carried: tuple[str, ...], device: torch.device) -> Groups:
        """The rows by the adapters ``carried``; those of others are of none."""
        if (carried, device) not in self._groups:
            places = {name: place for place, name in enumerate(carried)}
            index = [places.get(name, -1) if name is not None else -1 for name in self.names]
            self._groups[carried, device] = Groups.of(index, len(carried), device)
        return self._groups[carried, device]


class MixedForward:
    """The forward of ``layer``, of which no adapter is active, for the rows of ``rows``."""

    def __init__(self, layer: AdapterLayer, rows: MixedRows) -> None:
        self.layer, self.rows, self.forward = layer, rows, layer.forward
        held = layer.adapter_names()
        self.carried = tuple(name for name in rows.carried if name in held)
        self.grouped = cast(LinearUpdates, layer) if _can_group(layer, self.carried) else None
        self._kept: tuple[Stack, Tensor | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.rows.check(inputs.shape[0])
        if self.layer.disable_adapters or {*self.carried}.isdisjoint(self.rows.names):
            return self._by_base(*args, **kwargs)
        if self.grouped is not None and inputs.dim() > 1:
            return self._in_groups(self.grouped, inputs, self._by_base(*args, **kwargs))
        return self._in_parts(*args, **kwargs)

    def _by_base(self, *args: Any, **kwargs: Any) -> Any:
        is_plain = type(self.layer) in FUSED_CLASSES and not kwargs and len(args) == 1
        return cast(FusedUpdates, self.layer).plain(*args) if is_plain else self.forward(*args, **kwargs)

    def _in_groups(self, layer: LinearUpdates, x: Tensor, out: Tensor) -> Tensor:
        if layer.training:
            x = layer.dropped(self.carried[0], x)
        stack, factors = self._stacked(layer)
        groups = self.rows.groups(self.carried, x.device)
        if factors is None:
            return add_grouped_update(out, x, stack, groups)
        less_one = (factors - 1).index_select(0, groups.index)
        if groups.is_of_one is not None:
            less_one = less_one * groups.is_of_one[:, None]
        bias = layer._parameters.get("bias")
        base = upcast(out) if bias is None else upcast(out) - bias
        shape = (out.shape[0], *[1] * (out.dim() - 2), out.shape[-1])
        wide = torch.addcmul(upcast(out), base, less_one.view(shape))
        return add_grouped_update(wide, x, stack, groups).to(out.dtype)

    def _stacked(self, layer: LinearUpdates) -> tuple[Stack, Tensor | None]:
        """The factors of all adapters of the batch, and DoRA's factor of each output (adapters, out); kept
        where there is no gradient."""
        if self._kept is not None and not torch.is_grad_enabled():
            return self._kept
        names, factors = self.carried, None
        stack = stacked([layer.pair(name) for name in names], [layer.scaling[name] for name in names])
        if any(layer.use_dora[name] for name in names):
            ones = torch.ones(stack.lora_b.shape[1], device=stack.lora_b.device)
            factors = torch.stack([layer.row_factors(n) if layer.use_dora[n] else ones for n in names])
            stack = stack._replace(lora_b=stack.lora_b * factors[:, :, None].to(stack.lora_b.dtype))
        self._kept = None if torch.is_grad_enabled() else (stack, factors)
        return stack, factors

    def _in_parts(self, *args: Any, **kwargs: Any) -> Any:
        """The layer run once an adapter, on that adapter's rows."""
        names, rows, whole = self.rows.names, len(self.rows.names), None
        state, offsets = self.layer.__dict__, self.layer.__dict__.get(OFFSETS)
        try:
            for name in dict.fromkeys(names):
                index = torch.tensor([i for i, other in enumerate(names) if other == name])
                if offsets is not None:
                    state[OFFSETS] = [offsets[row] for row in index]
                self.layer.activate([] if name is None else [name])
                output = self.forward(
                    *(_rows_of(value, index, rows) for value in args),
                    **{key: _rows_of(value, index, rows) for key, value in kwargs.items()},
                )
                whole = _put(whole, output, index, rows)
        finally:
            self.layer.activate([])
            if offsets is not None:
                state[OFFSETS] = offsets
        return whole


def _can_group(layer: AdapterLayer, names: Sequence[str]) -> bool:
    """Whether the updates of ``names`` are products of two factors, after one and the same dropout."""
    if not isinstance(layer, LinearUpdates) or not names:
        return False
    configs = [layer.specs[name].config for name in names]
    dropouts = {config.lora_dropout for config in configs}
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    apart = any(config.lora_bias for config in configs) or any(each.update for each in variants)
    redrawn = layer.training and dropouts != {0.0} and any(config.use_dora for config in configs)
    # Rows of an adapter whose start split the base weight see another one.
    splits = layer.split is not None and not {*layer.split.names}.isdisjoint(names)
    return len(dropouts) == 1 and not (apart or redrawn or splits)


def _rows_of(value: Any, index: Tensor, rows: int) -> Any:
    of_rows = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
    return value[index.to(value.device)] if of_rows else value


def _put(whole: Any, part: Any, index: Tensor, rows: int) -> Any:
    """``whole``, made if it is None yet, with the rows of ``part`` at ``index``."""
    if isinstance(part, tuple):
        wholes = whole if whole is not None else [None] * len(part)
        return tuple(_put(own, each, index, rows) for own, each in zip(wholes, part, strict=True))
    if not isinstance(part, Tensor):
        return part
    if whole is None:
        whole = part.new_zeros((rows, *part.shape[1:]))
    return whole.index_copy(0, index.to(part.device), part)
