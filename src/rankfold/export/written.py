"""``Written``: what a format's writer tells of what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rankfold.export.judges import Judge
from rankfold.export.probes import Probing


@dataclass(frozen=True)
class Written:
    """``judge`` is who reads it, for a prompt style; ``numbers`` what most of it is written in, and
    ``most_kl`` the divergence in nats a token that this explains; ``notes`` what should be known.

    ``lost``: by the weight's name, how far what is written is from the adapter's change, to its length, and
    ``remedy`` what keeps it.  ``probing``: how each module is tried in the engine, if it is there."""

    judge: Callable[[str], Judge]
    numbers: str
    most_kl: float
    notes: list[str]
    lost: Mapping[str, float] = field(default_factory=dict)
    remedy: str = ""
    probing: Probing | None = None
