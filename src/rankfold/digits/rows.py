"""scikit-learn's handwritten digits as images and rows in files, split by a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfold.errors import ConfigError, DataError
from rankfold.files import staged_folder

QUESTION = "Digit?"  # short, because every token of a row costs time
FULL_INK = 16  # the highest value of a pixel
WHITE = 255
TRAIN, HELD_OUT, TEST = "train", "held_out", "test"


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: ``pixels`` (count, 8, 8) from 0 to 16, ``labels`` (count,) what each one is."""

    pixels: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DigitRow:
    """A digit's image in its file, and what it is."""

    image: Path
    label: str

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The conversation that shows the image and asks what it is."""
        parts = [{"type": "image", "path": str(self.image)}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": parts}]


def load_digits() -> Digits:
    """scikit-learn's 1,797 digits, which lie in the package.  Raises DataError if it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            "the handwritten digits come with scikit-learn, which is not installed; "
            "install it: pip install 'rankfold[vision]'"
        ) from error
    found = datasets.load_digits()
    return Digits(found.images, found.target)


def split_digits(digits: Digits, held_out: int, test: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """The numbers of the digits to train on, for the run to judge itself on, and to count answers on.

    The last two are drawn by ``seed`` and trained on by nothing; of equal images only the first is used.
    Raises ConfigError if nothing is left to train on."""
    _, first = np.unique(digits.pixels.reshape(len(digits.labels), -1), axis=0, return_index=True)
    order = np.random.default_rng(seed).permutation(np.sort(first))
    if held_out + test >= len(order):
        raise ConfigError(f"{held_out} + {test} digits held out of {len(order)} leave none to train on")
    tested, judged, trained = np.split(order, [test, test + held_out])
    return {TRAIN: trained, HELD_OUT: judged, TEST: tested}


def write_rows(digits: Digits, parts: dict[str, NDArray[np.int64]], folder: Path, side: int) -> None:
    """Write images of ``side`` pixels, and rows of chat that ask for them: ``NAME.jsonl`` for each of
    ``parts``.  The folder appears whole.  Raises OutputError."""
    with staged_folder(folder) as staging:
        (staging / "images").mkdir()
        for name, numbers in parts.items():
            lines = []
            for number in numbers.tolist():
                image = f"images/{number:04}.png"
                _write_image(digits.pixels[number], staging / image, side)
                lines.append(json.dumps(_row(image, str(digits.labels[number]))) + "\n")
            (staging / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_rows(file: Path) -> list[DigitRow]:
    """The rows of a file that ``write_rows`` wrote."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [DigitRow(file.parent / row["images"][0], row["messages"][-1]["content"]) for row in rows]


def _row(image: str, label: str) -> dict[str, Any]:
    turns = [("user", f"<image>{QUESTION}"), ("assistant", label)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], "images": [image]}


def _write_image(pixels: NDArray[np.float64], path: Path, side: int) -> None:
    from PIL import Image

    grey = np.round(pixels * (WHITE / FULL_INK)).astype(np.uint8)
    Image.fromarray(grey).resize((side, side), Image.Resampling.BICUBIC).save(path)


def accuracy(rows: Sequence[DigitRow], answers: Sequence[str]) -> float:
    """The share of ``answers`` that are the digit and nothing else."""
    return sum(row.label == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)
