"""Pictures of singular values."""

from __future__ import annotations

import io
from pathlib import Path

from torch import Tensor

from rankfold.files import write_whole


def plot_singular_values(values: Tensor, rank: int, path: Path) -> None:
    """Write a picture of ``values`` to ``path`` (.png or .svg), the first ``rank`` of them highlighted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(1, len(values) + 1)
    colours = ["#1f5fa8" if place <= rank else "#c9d3de" for place in places]
    axes.bar(places, values.tolist(), color=colours)
    axes.set(xlabel="singular value", ylabel="size", xticks=list(places))
    axes.set_title(f"{rank} of {len(values)} singular values carry the whole weight")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=150)
    write_whole(path, buffer.getvalue())
