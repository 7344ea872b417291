from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.errors import CheckpointError, OutputError, TrainingError
from rankfold.train.keeping.checkpoints import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Checkpoint,
    clear_partial,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        trained={"a.lora_B.weight": torch.randn(4, 3, generator=generator)},
        optimiser={"a.lora_B.weight.exp_avg": torch.randn(4, 3, generator=generator)},
        best={"a.lora_B.weight": torch.randn(4, 3, generator=generator)},
        state={"best": 1 / 3},
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    groups = [
        (one.trained, other.trained),
        (one.optimiser, other.optimiser),
        (one.averaged, other.averaged),
        (one.best, other.best),
    ]
    tensors = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in groups)
    return tensors and (one.step, one.state) == (other.step, other.state)


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_read_to_the_bit(tmp_path):
    folder = save_checkpoint(tmp_path, make(7), keep=2)
    assert same(read_checkpoint(folder), make(7))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_the_newest_by_step_is_taken_whatever_the_dates_say(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, make(step), keep=9)
    os.utime(tmp_path / "step-00000100", (0, 0))
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert same(checkpoint, make(100))
    assert passed_over == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert steps_in(tmp_path) == ["step-00000003", "step-00000010"]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["MANIFEST.json", "optimiser.safetensors", "best.safetensors", "state.json", "trained.safetensors"]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped bit", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_noticed_and_the_one_before_is_taken(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step), keep=2)
    damage(tmp_path / "step-00000002" / name)
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert same(checkpoint, make(1))
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]
    assert name in passed_over[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), data=st.data())
def test_any_flipped_bit_of_any_file_is_noticed_or_changes_nothing(tmp_path, name, data):
    """A bit of the manifest may sit in white space: then the same checkpoint is read."""
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    folder = save_checkpoint(tmp_path / "c", make(2), keep=1)
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    try:
        checkpoint = read_checkpoint(folder)
    except CheckpointError:
        return
    assert same(checkpoint, make(2))


def test_an_empty_newest_folder_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=1)
    (tmp_path / "step-00000099").mkdir()
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert "MANIFEST.json is missing" in passed_over[0]


def test_if_none_is_whole_that_is_an_error_that_lists_them_all(tmp_path):
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, make(step), keep=2) / "trained.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in (.|\n)*step-00000002(.|\n)*step-00000001"):
        latest_checkpoint(tmp_path)


def rewrite_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_one_from_a_newer_version_is_refused_rather_than_passed_over(tmp_path):
    for step in (1, 2):
        folder = save_checkpoint(tmp_path, make(step), keep=2)
    rewrite_manifest(folder, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(CheckpointError, match=rf"schema version {SCHEMA_VERSION + 1}.*reads up to"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["random.pth", "../evil.safetensors", "optimiser.bin"])
def test_a_manifest_cannot_name_another_file_to_read(tmp_path, name):
    folder = save_checkpoint(tmp_path, make(1), keep=1)
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    rewrite_manifest(folder, files=files | {name: {"bytes": 0, "sha256": ""}})
    with pytest.raises(CheckpointError, match="not one of rankfold's"):
        read_checkpoint(folder)


@pytest.mark.parametrize("manifest", ["[]", "{}", "[" * 100_000, '{"step": 1e999}', "\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path, manifest):
    folder = save_checkpoint(tmp_path, make(1), keep=1)
    (folder / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(CheckpointError, match="MANIFEST"):
        read_checkpoint(folder)


def test_a_checkpoint_moved_to_another_steps_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=1).rename(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match="not the checkpoint of that step"):
        read_checkpoint(tmp_path / "step-00000005")


@pytest.mark.parametrize("group", ["trained", "optimiser"])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path, group):
    save_checkpoint(tmp_path, make(1), keep=1)
    bad = make(2)
    next(iter(getattr(bad, group).values()))[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite are(.|\n)*lora_B"):
        save_checkpoint(tmp_path, bad, keep=1)
    assert same(latest_checkpoint(tmp_path)[0], make(1))


@pytest.mark.parametrize("number", [5, 28], ids=["input/output error", "disk full"])
def test_a_failed_sync_leaves_the_older_ones_and_nothing_half(tmp_path, monkeypatch, number):
    save_checkpoint(tmp_path, make(1), keep=1)

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=os.strerror(number)):
        save_checkpoint(tmp_path, make(2), keep=1)
    assert same(latest_checkpoint(tmp_path)[0], make(1))
    assert steps_in(tmp_path) == ["step-00000001"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=1)
    (tmp_path / ".step-00000002.partial-123").mkdir()
    clear_partial(tmp_path)
    assert steps_in(tmp_path) == ["step-00000001"]


def test_a_damaged_one_gives_way_when_its_step_is_reached_again(tmp_path):
    truncate(save_checkpoint(tmp_path, make(3), keep=1) / "state.json")
    save_checkpoint(tmp_path, make(3), keep=1)
    assert same(latest_checkpoint(tmp_path)[0], make(3))


def test_one_of_version_1_is_read_without_the_random_states_it_carried():
    """A folder as version 1 wrote it, file by file."""
    checkpoint = read_checkpoint(Path(__file__).parent / "checkpoint-1" / "step-00000002")
    assert (checkpoint.step, checkpoint.version, checkpoint.state) == (2, 1, {})
    assert torch.equal(checkpoint.trained["a.lora_B.weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert set(checkpoint.optimiser) == {"a.lora_B.weight.exp_avg"}
    assert not checkpoint.best
    assert not checkpoint.averaged


def test_moments_may_be_lacking_only_where_that_is_allowed(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=2)
    folder = save_checkpoint(tmp_path, make(2), keep=2)
    truncate(folder / "optimiser.safetensors")
    assert latest_checkpoint(tmp_path)[0].step == 1
    checkpoint, passed_over = latest_checkpoint(tmp_path, may_lack=("optimiser",))
    assert checkpoint.step == 2
    assert checkpoint.trained
    assert not checkpoint.optimiser
    assert passed_over == []
