from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rankfold.digits.picture import confusion, draw
from rankfold.digits.rows import load_digits, read_rows, write_rows
from rankfold.errors import OutputError


@pytest.fixture
def rows(tmp_path):
    write_rows(load_digits(), {"test": np.arange(60)}, tmp_path / "rows", 32)
    return read_rows(tmp_path / "rows" / "test.jsonl")


def test_every_answer_is_counted_once(rows):
    answers = [row.label for row in rows]
    answers[3], answers[5], answers[6] = "8", "a duck", "12"
    counts = confusion(rows, answers)
    assert counts.shape == (10, 11)
    assert counts.sum() == len(rows)
    assert np.trace(counts) == len(rows) - 3
    assert counts[3, 8] == counts[5, 10] == counts[6, 10] == 1


def test_the_picture_is_written_whole_with_any_answer(rows, tmp_path):
    answers = [row.label for row in rows]
    answers[0], answers[1], answers[2] = "$x^{", "\n\n很长的一句回答", ""
    draw(rows, answers, 0.1, tmp_path / "digits.png")
    with Image.open(tmp_path / "digits.png") as picture:
        picture.load()
        assert picture.size == (1540, 726)
        assert len(picture.convert("L").getcolors()) > 100
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["digits.png"]


def test_few_rows_make_a_picture_too(rows, tmp_path):
    draw(rows[:3], ["0", "1", "x"], 0.0, tmp_path / "few.png")
    assert (tmp_path / "few.png").stat().st_size > 10_000


def test_nothing_is_left_of_a_picture_that_cannot_be_written(rows, tmp_path):
    (tmp_path / "digits.png").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        draw(rows, [row.label for row in rows], 0.1, tmp_path / "digits.png")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
