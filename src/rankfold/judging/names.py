"""What models and runs are called beside each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rankfold.errors import ConfigError


def short_names(paths: Sequence[str | Path], taken: Collection[str] = ()) -> list[str]:
    """Of each path the shortest end that tells it from the others and is not ``taken``.

    Raises ConfigError for one that is named twice."""
    parts = [Path(path).absolute().parts[1:] for path in paths]
    for place, own in enumerate(parts):
        if own in parts[:place]:
            raise ConfigError(f"{paths[place]} is named twice")
    return [_short(own, [other for other in parts if other is not own], taken) for own in parts]


def _short(own: tuple[str, ...], others: list[tuple[str, ...]], taken: Collection[str]) -> str:
    ends = (own[-length:] for length in range(1, len(own) + 1))
    told = (end for end in ends if all(other[-len(end) :] != end for other in others))
    return next(("/".join(end) for end in told if "/".join(end) not in taken), "/" + "/".join(own))
