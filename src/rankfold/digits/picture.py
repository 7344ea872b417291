"""What the model read, as a picture: digits with its answers, and the confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfold.digits.rows import DigitRow
from rankfold.files import write_whole

GRID_ROWS, GRID_COLUMNS = 6, 8
DIGITS = [str(digit) for digit in range(10)]
OTHER = "other"  # an answer that is no digit
RIGHT, WRONG = "#1a7f37", "#c62828"
LONGEST = 5  # characters of an answer that are shown


def confusion(rows: Sequence[DigitRow], answers: Sequence[str]) -> NDArray[np.int64]:
    """How often each digit (10 rows) got each answer (11 columns, the last for what is no digit)."""
    counts = np.zeros((len(DIGITS), len(DIGITS) + 1), dtype=np.int64)
    for row, answer in zip(rows, answers, strict=True):
        column = DIGITS.index(answer) if answer in DIGITS else len(DIGITS)
        counts[DIGITS.index(row.label), column] += 1
    return counts


def draw(rows: Sequence[DigitRow], answers: Sequence[str], before: float, path: Path) -> None:
    """Write a picture to ``path`` (.png): the first rows as they come, right and wrong, and all in a matrix.

    ``before``: the share of right answers before training.  Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(1, 2)
    left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    counts = confusion(rows, answers)
    correct = int(np.trace(counts))
    figure.suptitle(
        f"{correct} of {len(rows)} held-out digits read right: {correct / len(rows):.1%} "
        f"({before:.1%} before training, 10 % is chance)",
        fontsize=14,
    )
    _draw_grid(left, rows, answers)
    _draw_matrix(right, counts)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def _draw_grid(figure: Any, rows: Sequence[DigitRow], answers: Sequence[str]) -> None:
    from PIL import Image

    shown = min(GRID_ROWS * GRID_COLUMNS, len(rows))
    figure.suptitle(f"The first {shown} of them, not picked, and the model's answers", fontsize=11)
    grid = figure.subplots(GRID_ROWS, GRID_COLUMNS, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place < shown:
            row, answer = rows[place], answers[place]
            with Image.open(row.image) as image:
                axes.imshow(np.asarray(image), cmap="gray_r")
            told = f"{_short(answer)} ✓" if answer == row.label else f"{_short(answer)} ✗ is {row.label}"
            colour = RIGHT if answer == row.label else WRONG
            axes.set_title(told, color=colour, fontsize=10, pad=3, parse_math=False)


def _draw_matrix(figure: Any, counts: NDArray[np.int64]) -> None:
    axes = figure.subplots()
    shade = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shade, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (digit, answer), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shade[digit, answer] > 1 / 2 else "black"
            axes.text(answer, digit, str(count), ha="center", va="center", color=ink, fontsize=10)
    axes.set_xticks(range(len(DIGITS) + 1), [*DIGITS, OTHER])
    axes.set_yticks(range(len(DIGITS)), DIGITS)
    axes.set(xlabel="the model's answer", ylabel="the digit")
    axes.set_title("How often each digit got each answer", fontsize=11)


def _short(answer: str) -> str:
    """A digit as it is, any other answer's beginning in quotes; the font has few letters beyond ASCII."""
    line = " ".join(answer.split()).encode("ascii", "replace").decode()
    return answer if answer in DIGITS else repr(line[:LONGEST])
