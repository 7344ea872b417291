from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.digits.rows import (
    Digits,
    accuracy,
    load_digits,
    read_rows,
    split_digits,
    write_rows,
)
from rankfold.errors import ConfigError, DataError, OutputError


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_the_digits_are_scikit_learns(digits):
    assert digits.pixels.shape == (1797, 8, 8)
    assert (digits.pixels.min(), digits.pixels.max()) == (0, 16)
    assert set(digits.labels.tolist()) == set(range(10))


def test_the_parts_share_no_image_and_use_them_all(digits):
    parts = split_digits(digits, held_out=100, test=360, seed=0)
    numbers = np.concatenate([*parts.values()])
    images = [digits.pixels[number].tobytes() for number in numbers]
    assert len({*images}) == len(images) == len({image.tobytes() for image in digits.pixels})
    assert {name: len(part) for name, part in parts.items()} == {
        "train": len(images) - 460,
        "held_out": 100,
        "test": 360,
    }


def test_the_seed_and_nothing_else_decides_the_split(digits):
    once, again, other = (split_digits(digits, 100, 360, seed) for seed in (3, 3, 4))
    assert all((once[name] == again[name]).all() for name in once)
    assert {*once["test"].tolist()} != {*other["test"].tolist()}


def test_equal_images_stand_on_one_side_only():
    pixels = np.zeros((40, 8, 8))
    pixels[:20, 0, 0] = pixels[20:, 0, 0] = np.arange(20) % 16
    pixels[:20, 0, 1] = pixels[20:, 0, 1] = np.arange(20) // 16
    parts = split_digits(Digits(pixels, np.zeros(40, dtype=np.int64)), held_out=3, test=5, seed=0)
    assert sorted(np.concatenate([*parts.values()]).tolist()) == list(range(20))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(digits):
    with pytest.raises(ConfigError, match=r"1000 \+ 797 digits held out of 1797 leave none to train on"):
        split_digits(digits, 1000, 797, 0)


def test_the_rows_are_images_and_chat_that_any_run_reads(digits, tmp_path):
    parts = split_digits(digits, held_out=3, test=4, seed=0) | {"train": np.arange(5)}
    write_rows(digits, parts, tmp_path / "rows", 32)
    rows = read_rows(tmp_path / "rows" / "test.jsonl")
    assert [row.label for row in rows] == [str(digits.labels[number]) for number in parts["test"]]
    for row, number in zip(rows, parts["test"], strict=True):
        image = Image.open(row.image)
        assert image.size == (32, 32)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), digits.pixels[number].ravel())[0, 1] > 0.95
    examples = read_examples(sources_of(tmp_path / "rows" / "train.jsonl", None), 0, 0.0).examples
    assert [example.answer for example in examples] == [str(label) for label in digits.labels[:5]]
    assert [len(example.messages[0].images) for example in examples] == [1] * 5


def test_rows_are_not_written_over_others(digits, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "mine").touch()
    with pytest.raises(OutputError, match="cannot complete the folder"):
        write_rows(digits, {"test": np.arange(2)}, tmp_path / "rows", 32)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["mine"]


def test_only_the_digit_alone_is_right(digits, tmp_path):
    write_rows(digits, {"test": np.arange(4)}, tmp_path / "rows", 32)
    rows = read_rows(tmp_path / "rows" / "test.jsonl")
    assert [row.label for row in rows] == ["0", "1", "2", "3"]
    assert accuracy(rows, ["0", "1", "two", "33"]) == 0.5
    assert accuracy(rows, ["", "It is 1", "2.", "3 "]) == 0


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"not installed; install it: pip install 'rankfold\[vision\]'"):
        load_digits()


def test_what_is_asked_is_what_was_trained(digits, tmp_path):
    write_rows(digits, {"test": np.arange(1)}, tmp_path / "rows", 32)
    file = tmp_path / "rows" / "test.jsonl"
    [row], [example] = read_rows(file), read_examples(sources_of(file, None), 0, 0.0).examples
    assert row.asked == example.prompt
    assert json.loads(file.read_text())["images"] == ["images/0000.png"]
