from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from rankfold.digits import lesson as lessons
from rankfold.digits.assemble import Tower
from rankfold.digits.lesson import Lesson, teach
from rankfold.digits.rows import accuracy, read_rows
from rankfold.errors import ModelError, OutputError
from rankfold.models.answering.answers import reply
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.load import load_tuned
from rankfold.train.keeping.listener import Listener

TINY = Tower(width=16, layers=1, heads=2, patch_side=8)
FEW_STEPS = {"max_steps": 3, "rows_per_step": 8, "epochs": 1, "samples": 1, "precision": "float32"}


@pytest.fixture(scope="module")
def tiny_lesson(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("lesson") / "digits"
    options = {"tower": TINY, "held_out": 20, "test": 30, "settings": FEW_STEPS}
    return Lesson(out=out, language=str(tiny_folder), **options)


@pytest.fixture(scope="module")
def outcome(tiny_lesson):
    return teach(tiny_lesson, Listener())


def test_it_leaves_model_rows_run_numbers_and_picture(outcome, tiny_lesson):
    assert {path.name for path in tiny_lesson.out.iterdir()} == {
        *("model", "rows", "run", "digits.json", "digits.png")
    }
    assert {path.name for path in tiny_lesson.run.iterdir()} >= {
        *("report.html", "adapter_model.safetensors", "recipe.yaml", "run.json")
    }
    with Image.open(outcome.picture) as picture:
        picture.load()
    assert outcome.seconds > 0
    assert outcome.cpu_seconds > 0


def test_the_digits_asked_for_are_in_no_row_of_the_run(outcome, tiny_lesson):
    recipe = tiny_lesson.recipe()
    seen = [read_rows(file) for file in (recipe.data, recipe.held_out)]
    images = {row.image.read_bytes() for rows in seen for row in rows}
    asked = read_rows(tiny_lesson.rows / "test.jsonl")
    assert len(asked) == 30
    assert not {row.image.read_bytes() for row in asked} & images
    assert len(images) == sum(map(len, seen))


def test_every_part_is_trained_the_new_ones_whole(outcome, tiny_lesson):
    config = json.loads((tiny_lesson.run / "adapter_config.json").read_text())
    assert {*config["modules_to_save"]} == {"multi_modal_projector", "vision_tower"}
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}


def test_accuracy_is_counted_on_generated_answers(outcome, tiny_lesson):
    """Each answer that was counted is what the tuned model says when it is asked that alone."""
    record = json.loads((tiny_lesson.out / "digits.json").read_text())
    rows = read_rows(tiny_lesson.rows / "test.jsonl")
    assert outcome.after == record["after"] == accuracy(rows, record["answers_after"])
    assert outcome.before == accuracy(rows, record["answers_before"])
    tuned = load_tuned(tiny_lesson.run)
    for row, answer in list(zip(rows, record["answers_after"], strict=True))[:4]:
        assert reply(tuned, row.asked, lessons.SAMPLING) == answer


def test_plain_chat_is_measured_before_and_after(outcome):
    assert outcome.text.rows == 44
    assert outcome.text.base_loss > 0
    assert outcome.text.tuned_loss != outcome.text.base_loss


def test_a_second_lesson_in_the_same_folder_is_refused_and_changes_nothing(outcome, tiny_lesson):
    before = {path: path.stat().st_mtime_ns for path in tiny_lesson.out.rglob("*")}
    with pytest.raises(OutputError, match=r"digits exists and is not an empty folder; name another --out"):
        teach(tiny_lesson, Listener())
    assert {path: path.stat().st_mtime_ns for path in tiny_lesson.out.rglob("*")} == before


@pytest.mark.parametrize("language", ["no/such/folder/here", "{broken}"])
def test_a_language_model_that_cannot_be_loaded_leaves_nothing(tiny_lesson, tmp_path, language):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    language = language.format(broken=tmp_path / "broken")
    out = tmp_path / "digits"
    with pytest.raises(ModelError):
        teach(dataclasses.replace(tiny_lesson, out=out, language=language), Listener())
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tiny_lesson, tmp_path):
    (tmp_path / "digits").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        teach(dataclasses.replace(tiny_lesson, out=tmp_path / "digits"), Listener())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_real_model_learns_to_read_nine_digits_in_ten(tmp_path):
    outcome = teach(Lesson(out=tmp_path / "digits", language=DEFAULT_MODEL), Listener())
    assert outcome.digits == 360
    assert outcome.before < 0.2
    assert outcome.after >= 0.9
