"""EVA: A starts as the principal directions of the layer's inputs, and the ranks of all layers together are
given to those whose directions explain most.  Paischer et al. 2024, arXiv 2410.07170.

PEFT's incremental decomposition keeps some directions of each batch; here the second moments of all rows are
kept, whose eigenvectors are those of the data themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import DataError
from rankfold.lora.config.data_starts import EvaConfig
from rankfold.lora.starts.moments import Inputs, Moments, Watch

MOMENT_BYTES = 4 << 30  # of the moments that are kept at a time; more layers take more passes over the rows


@dataclass(frozen=True)
class Directions:
    """Principal directions (count, in), by falling share of the variance ``shares`` (count), with the
    ``values`` (count), the roots of their sums of squares."""

    rows: Tensor
    shares: Tensor
    values: Tensor

    @classmethod
    def of(cls, moments: Moments, count: int) -> Directions:
        squares, columns = torch.linalg.eigh(moments.centred().double())
        squares, columns = squares.flip(0).clamp_min(0), columns.flip(1)
        whole = squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        rows = columns[:, :count].T
        largest = rows.abs().argmax(1, keepdim=True)
        rows = rows * rows.gather(1, largest).sign()  # one sign for one direction
        dtype = moments.second.dtype
        return cls(
            rows.contiguous().to(dtype), (squares / whole)[:count].to(dtype), squares[:count].sqrt().to(dtype)
        )

    def converged(self, before: Directions, count: int, at_least: float) -> bool:
        """Whether the first ``count`` directions are those of ``before``, up to this cosine."""
        likeness = F.cosine_similarity(self.rows[:count], before.rows[:count]).abs()
        return bool((likeness >= at_least).all())


def distributed(
    found: Mapping[str, Directions], leader: Mapping[str, str], budget: int, most: Mapping[str, int]
) -> dict[str, int]:
    """The rank of each layer: the ``budget`` directions of the largest shares, at most ``most`` a layer.

    Of layers with the same input the ``leader`` has the largest rank, and all as many to choose from, as in
    PEFT."""
    most = {name: max(most[n] for n in leader if leader[n] == leader[name]) for name in leader}
    names = [name for name in leader for _ in found[leader[name]].shares[: most[name]]]
    shares = torch.cat([found[leader[name]].shares[: most[name]] for name in leader])
    chosen = shares.argsort(descending=True)[:budget].tolist()
    ranks = dict.fromkeys(leader, 0)
    for place in chosen:
        ranks[names[place]] += 1
    for name, first in leader.items():
        if ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def eva_start(
    watch: Watch, forwards: Callable[[], Iterator[None]], ranks: Mapping[str, int], config: EvaConfig
) -> dict[str, Tensor]:
    """A (rank, in) of each watched layer, which together have the ``ranks`` that are asked for.

    ``forwards`` runs the model on a batch at a time, from the first one each time it is called.  It ends when
    the directions have stopped turning since half as many batches.  Raises DataError for a layer that was
    given no rows."""
    most = {name: round(rank * min(config.rho, 1000)) for name, rank in ranks.items()}
    found: dict[str, Directions] = {}
    leader: dict[str, str] = {}
    for group in _groups(watch.layers):
        inputs = Inputs(replace(watch, layers=group))
        with inputs.gathered():
            found |= _settled(inputs, forwards(), ranks, most, config.tau)
        leader |= {name: inputs.leader[name] for name in group}
    given = distributed(found, leader, sum(ranks.values()), most)
    start = {}
    for name, rank in given.items():
        own = found[leader[name]]
        rows = own.rows[:rank]
        start[name] = rows / own.values[:rank, None].sqrt() if config.whiten else rows.clone()
    return start


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """``layers`` in groups whose moments fit into ``MOMENT_BYTES``."""
    group: dict[str, nn.Module] = {}
    taken = 0
    for name, layer in layers.items():
        needed = 4 * int(layer.in_features) ** 2 if hasattr(layer, "in_features") else 0  # type: ignore[arg-type]
        if group and taken + needed > MOMENT_BYTES:
            yield group
            group, taken = {}, 0
        group[name], taken = layer, taken + needed
    yield group


def _settled(
    inputs: Inputs, forwards: Iterator[None], ranks: Mapping[str, int], most: Mapping[str, int], tau: float
) -> dict[str, Directions]:
    """The directions by the leaders' names, after one, two, four, ... batches until they no longer turn."""
    before: dict[str, Directions] = {}
    seen = looked = 0
    for _ in forwards:
        seen += 1
        if seen < 2 * looked:
            continue
        found, looked = _directions(inputs, most), seen
        settled = all(
            name in before and each.converged(before[name], ranks[name], tau) for name, each in found.items()
        )
        before = found
        if settled:
            break
    if missing := [name for name in inputs.watch.layers if inputs.leader.get(name) not in inputs.moments]:
        raise DataError(f"these layers were given no rows: {', '.join(missing)}")
    return before if seen == looked else _directions(inputs, most)


def _directions(inputs: Inputs, most: Mapping[str, int]) -> dict[str, Directions]:
    counts = {
        first: max(most[n] for n in inputs.leader if inputs.leader[n] == first) for first in inputs.moments
    }
    return {name: Directions.of(moments, counts[name]) for name, moments in inputs.moments.items()}
