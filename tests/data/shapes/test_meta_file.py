"""InternVL's meta files as sources, and the files that InternVL and xtuner keep rows in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from image_bases import noise
from rankfold import Recipe
from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.shapes.sources import Source, read_examples, sources_of
from rankfold.errors import DataError
from rankfold.train.asked.advise import settle
from rankfold.train.asked.recipe_file import resolved_recipe

LLAVA = {"id": 1, "image": "cat.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
LLAVA["conversations"].append({"from": "gpt", "value": "A cat."})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A meta file beside its annotations, whose images lie in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    noise(tmp_path / "pictures" / "cat.png", 20, 20)
    (tmp_path / "cats.jsonl").write_text(json.dumps(LLAVA) + "\n")
    text = {"id": 2, "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]}
    (tmp_path / "talk.jsonl").write_text((json.dumps(text) + "\n") * 4)
    return tmp_path


def write_meta(folder: Path, **entries) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps(entries, indent=2))
    return path


def entry(rows: str, **more) -> dict:
    return {
        "root": "pictures",
        "annotation": rows,
        "data_augment": False,
        "repeat_time": 1,
        "length": 1,
    } | more


def test_a_meta_file_is_its_data_sets(files):
    meta = write_meta(
        files, cats=entry("cats.jsonl", repeat_time=3), talk=entry("talk.jsonl", repeat_time=0.5)
    )
    mixture = read_examples(sources_of(meta))
    images = [m.images[0].path for e in mixture.examples for m in e.messages if m.images]
    assert images == [Path("pictures/cat.png")] * 3
    assert len(mixture.examples) == 3 + 2
    assert "cats.jsonl: 1 rows of llava" in mixture.description


def test_its_paths_may_be_relative_to_itself(files, monkeypatch):
    meta = write_meta(files, cats=entry("cats.jsonl"))
    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")
    [example] = read_examples(sources_of(meta)).examples
    assert example.messages[0].images[0].path == files / "pictures" / "cat.png"


def test_a_weight_counts_for_all_of_it(files):
    meta = write_meta(files, cats=entry("cats.jsonl", repeat_time=2))
    assert [source.weight for source in sources_of(f"{meta}:2")] == [4]


def test_what_is_not_done_here_is_told(files):
    meta = write_meta(files, cats=entry("cats.jsonl", data_augment=True, max_dynamic_patch=6))
    told = (
        "not done: data_augment (images are read as they are), max_dynamic_patch 6 (say image_tiles, for all"
    )
    assert told in read_examples(sources_of(meta)).description
    assert any(told in note for note in check(CheckRequest.of({"data": str(meta)})).notes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"annotation": 3}, "cats: annotation must be the path of a file of rows, got 3"),
        ({"annotation": "cats.jsonl", "root": 1}, "cats: root must be the path of the images' folder, got 1"),
        ({"annotation": "cats.jsonl", "repeat_time": 0}, "cats: repeat_time must be a number above 0, got 0"),
        ({"annotation": "cats.jsonl", "repeat_time": True}, "got True"),
        (
            {"annotation": "cats.jsonl", "repeat_times": 2},
            "unknown key 'repeat_times' .did you mean 'repeat_time'",
        ),
    ],
)
def test_mistakes_in_a_meta_file_are_told_with_their_data_set(files, values, message):
    with pytest.raises(DataError, match=message):
        sources_of(write_meta(files, cats=values))


def test_a_root_that_is_not_there_is_told(files):
    meta = write_meta(files, cats=entry("cats.jsonl", root="nowhere"))
    with pytest.raises(DataError, match=r"no such folder of images: nowhere, for the rows of cats.jsonl"):
        read_examples(sources_of(meta))


@pytest.mark.parametrize("text", ['{"a": {"b": 1}}', '{"prompt": "a", "completion": "b"}', "{", "[]", "\xff"])
def test_a_file_of_rows_is_no_meta_file(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    assert sources_of(path) == [Source(path)]


def test_a_run_s_own_recipe_names_the_folders_of_images(files):
    meta = write_meta(files, cats=entry("cats.jsonl"), talk=entry("talk.jsonl", root=""))
    recipe = Recipe.of({"data": meta, "out": "run"})
    cats, talk = resolved_recipe(recipe, settle(recipe, 10, 10))["data"]
    assert cats == {"path": str(files / "cats.jsonl"), "weight": 1.0, "images": str(files / "pictures")}
    assert talk == {"path": str(files / "talk.jsonl"), "weight": 1.0}
    again = Recipe.of({"data": [cats, talk], "out": "run"})
    assert [source.images for source in sources_of(again.data)] == [str(files / "pictures"), None]


def test_xtuners_own_rows_are_read(tmp_path):
    """xtuner's docs/en/user_guides/dataset_format.md: a list of conversations of exchanges."""
    exchanges = [
        {"system": "Be brief.", "input": "Hi.", "output": "Ho."},
        {"input": "More?", "output": "No.", "output_with_loss": False},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"conversation": exchanges}]))
    mixture = read_examples([Source(path)])
    assert "1 rows of xtuner (column conversation)" in mixture.description
    turns = [(message.role, message.text, message.train) for message in mixture.examples[0].messages]
    assert turns == [
        ("system", "Be brief.", None),
        ("user", "Hi.", None),
        ("assistant", "Ho.", None),
        ("user", "More?", None),
        ("assistant", "No.", False),
    ]


def test_xtuners_rows_without_input_are_running_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"conversation": [{"input": "", "output": "It was cold."}]}]))
    mixture = read_examples([Source(path)])
    assert (mixture.prompt_style, mixture.examples[0].text) == ("plain", "It was cold.")
