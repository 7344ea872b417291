"""How alike two adapters are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rankfold.lora.algebra.factor_svd import FactorSVD


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of two adapters over the ``modules`` that both change.

    ``cosine``: of all numbers of their updates, between -1 and 1.  ``read`` and ``written``: the share of the
    smaller one's input and output directions that lies in the other's, on average over the modules (Hu et
    al. 2021, arXiv 2106.09685, section 7.2); ``read_by_chance`` and ``written_by_chance`` are what
    directions without any relation share."""

    modules: int
    cosine: float
    read: float
    written: float
    read_by_chance: float
    written_by_chance: float


def likeness(first: Mapping[str, FactorSVD], second: Mapping[str, FactorSVD]) -> Likeness:
    """Of two adapters' updates by module."""
    paths = sorted(first.keys() & second.keys())
    inner, shares = 0.0, [0.0] * 4
    for path in paths:
        one, other = first[path], second[path]
        written, read = one.U.T @ other.U, one.V.T @ other.V
        inner += float((one.S[:, None] * written * read * other.S).sum())
        least, most = sorted((len(one.S), len(other.S)))
        found = (
            float(read.square().sum()) / least,
            float(written.square().sum()) / least,
            most / len(one.V),
            most / len(one.U),
        )
        shares = [total + share / len(paths) for total, share in zip(shares, found, strict=True)]
    squares = [sum(svd.norm_squared for svd in each.values()) for each in (first, second)]
    cosine = inner / math.sqrt(math.prod(squares)) if all(squares) else 0.0
    read_, written_, read_by_chance, written_by_chance = shares
    return Likeness(
        modules=len(paths),
        cosine=cosine,
        read=read_,
        written=written_,
        read_by_chance=read_by_chance,
        written_by_chance=written_by_chance,
    )
