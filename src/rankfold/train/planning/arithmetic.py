"""The multiplications and additions of a run, by formula (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.data.order.pack import operations
from rankfold.models.adapters.modalities import model_parts

GENERAL_SHARE, GENERAL_LEAST_S = 0.05, 5.0  # of a run's time, and seconds, for general text
ATTENTION_BACKWARD = 2.5  # times its forward: five products for two (Dao 2023, arXiv 2307.08691, section 3.1)


def general_seconds(seconds: float) -> float:
    """That a run of so many seconds spends on general text, twice read, where nothing else is asked for."""
    return max(GENERAL_LEAST_S, GENERAL_SHARE * seconds)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is multiplied: ``linear`` operations a token of the frozen language model's forward, ``width``
    features of all its layers, numbers of ``head`` and ``adapter``, and ``tile``, the operations of tower
    and projector forward on one tile."""

    linear: float
    width: int
    head: int
    adapter: int
    tile: float
    tiles_are_trained: bool

    def forward(self, length: int, tiles: float = 0) -> float:
        """Of a row of ``length`` tokens, without the head."""
        attention = 4.0 * self.width * length**2
        return (self.linear + 2 * self.adapter) * length + attention + tiles * self.tile

    def step(self, length: int, trained: float, tiles: float = 0, *, recomputed: bool = False) -> float:
        """Forward and backward of a row, ``trained`` of whose tokens reach the head.

        A frozen weight takes one product back, for the gradient of its input; a trained one takes two."""
        back = (self.linear + 4 * self.adapter) * length
        back += ATTENTION_BACKWARD * 4 * self.width * length**2
        back += tiles * self.tile if self.tiles_are_trained else 0
        again = self.forward(length) if recomputed else 0
        return self.forward(length, tiles) + back + again + 4 * self.head * trained


def work_of(base: Any, trained: Mapping[str, int]) -> Work:
    """The work of a base that has no adapter yet; ``trained``: how many numbers of each part will be."""
    config, head, decoder = base.config.get_text_config(), base.get_output_embeddings(), base.get_decoder()
    width = config.num_hidden_layers * config.hidden_size
    return Work(
        linear=operations(decoder, [(1, 1)]) - 4 * width,
        width=width,
        head=0 if head is None else head.weight.numel(),
        adapter=trained.get("language", 0),
        tile=_tile_forward(base),
        tiles_are_trained=bool(trained.get("vision")),
    )


def _tile_forward(base: Any) -> float:
    """Forward of a tower with a fixed number of patches a tile, and of its projector; 0 without one."""
    tokens = patches(base)
    if not tokens:
        return 0.0
    parts, vision = model_parts(base), base.config.vision_config
    tower, projector = (
        sum(p.numel() for name in names for p in base.get_submodule(name).parameters())
        for names in (parts.vision, parts.projector)
    )
    attention = 4.0 * vision.num_hidden_layers * vision.hidden_size * tokens**2
    return float(2 * tower * tokens + attention + 2 * projector * base.config.image_seq_length)


def patches(base: Any) -> int:
    """What the tower of an InternVL makes of a tile: its patches and one more; 0 for any other model."""
    vision = getattr(base.config, "vision_config", None)
    size, patch = (_side(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    counts = size and patch and hasattr(base.config, "image_seq_length")
    return (size // patch) ** 2 + 1 if counts else 0


def _side(value: int | Sequence[int] | None) -> int:
    return value if isinstance(value, int) else int(value[0]) if value else 0
