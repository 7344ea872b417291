"""What layers are given while a model runs: the first and second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Which rows (rows, in) of a layer's input count, by the layer's name; None for none.
Taken = Callable[[Tensor, str], Tensor | None]


@dataclass
class Moments:
    """Sums over the rows seen: how many, in how many ``forwards``, themselves (in), their outer products
    (in, in); float32, or float64 where the input is."""

    count: int
    forwards: int
    total: Tensor
    second: Tensor

    @classmethod
    def none(cls, width: int, like: Tensor) -> Moments:
        dtype = torch.promote_types(like.dtype, torch.float32)
        options: dict[str, Any] = {"dtype": dtype, "device": like.device}
        return cls(0, 0, torch.zeros(width, **options), torch.zeros(width, width, **options))

    def add(self, rows: Tensor) -> None:
        wide = rows.to(self.second.dtype)
        self.count += len(rows)
        self.forwards += 1
        self.total += wide.sum(0)
        self.second.addmm_(wide.T, wide)

    def centred(self) -> Tensor:
        """The sum of squares about the mean, (in, in)."""
        return torch.addr(self.second, self.total, self.total, alpha=-1 / self.count)


@dataclass(frozen=True)
class Watch:
    """What to look at: ``layers`` of ``model`` by their names, and which rows of their inputs to ``take``.
    Layers with the same input are looked at once where it ``shares``."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    take: Taken
    shares: bool = True


class Inputs:
    """The moments of the inputs of some layers, one for all layers that are given the same tensor.

    ``moments`` are by the name of the first of such layers, ``leader`` says which that is for each layer."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.moments: dict[str, Moments] = {}
        self.leader: dict[str, str] = {}
        self._seen: dict[tuple[int, torch.Size], tuple[Tensor, str]] = {}

    def __getitem__(self, name: str) -> Moments:
        return self.moments[self.leader[name]]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block what the layers are given in each forward of the model is added."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, layer in self.watch.layers.items()
        ]
        # Another forward may put other values into the same memory.
        handles.append(self.watch.model.register_forward_hook(lambda *_: self._seen.clear()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._add(name, given.detach())

        return hook

    def _add(self, name: str, given: Tensor) -> None:
        # The tensor is kept until the forward ends, so that its memory is not another's meanwhile.
        key = (given.data_ptr(), given.shape)
        _, first = self._seen.setdefault(key, (given, name)) if self.watch.shares else (given, name)
        leader = self.leader.setdefault(name, first)
        if leader != name:
            return
        rows = self.watch.take(given, name)
        if rows is None or not len(rows):
            return
        if name not in self.moments:
            self.moments[name] = Moments.none(rows.shape[-1], rows)
        self.moments[name].add(rows)
