"""Checkpoints of a run: each appears whole or not at all, is verified before it is used, and holds all that
the next step depends on.

A checkpoint is a folder ``step-00000040`` with ``state.json``, safetensors files and, in it, the hash
and size of every one of them: ``MANIFEST.json``.  Nothing in it is pickled, and no other file is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import CheckpointError, OutputError, TrainingError, bullet_list
from rankfold.files import staged_folder

SCHEMA_VERSION = 2
MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "state.json"
TENSOR_FILES = ("trained", "optimiser", "averaged", "best")
NEEDED_FILES = {STATE_NAME, "trained.safetensors", "optimiser.safetensors"}
OLD_FILES = {"random.safetensors"}  # of version 1, which carried the random states from step to step
NAME_PATTERN = "step-[0-9]*"
NONE = tensors_to_bytes({})

Tensors = Mapping[str, Tensor]


class NewerCheckpointError(CheckpointError):
    """Written by a newer version; falling back to an older checkpoint would lose good steps."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state after ``step`` optimiser steps: ``trained`` weights by name, the ``optimiser``'s moments by
    the same names, the ``averaged`` and the ``best`` weights where there are some, and ``state``, which is
    what the run wants to know again and JSON.  The ``version`` is the one that it was written by."""

    step: int
    trained: Tensors
    optimiser: Tensors
    averaged: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    version: int = SCHEMA_VERSION


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` below ``root``, read it back, and only then drop all but the newest ``keep``.

    Raises OutputError, or TrainingError if a weight or a moment is not finite; every older checkpoint
    is then still there."""
    _require_finite(checkpoint)
    folder = root / _folder_name(checkpoint.step)
    if folder.exists():
        shutil.rmtree(folder)  # only a damaged one can stand in the way: a good one would have been resumed
    with staged_folder(folder) as staging:
        for name in TENSOR_FILES:
            if group := getattr(checkpoint, name):
                _write(group, staging / f"{name}.safetensors")
        state = json.dumps(checkpoint.state, sort_keys=True)
        (staging / STATE_NAME).write_text(state, encoding="utf-8")
        marks = {path.name: _mark(path.read_bytes()) for path in staging.iterdir()}
        manifest = {"schema_version": SCHEMA_VERSION, "step": checkpoint.step, "files": marks}
        (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
    try:
        for name, mark in _manifest(folder)["files"].items():
            _content(folder / name, mark)
    except CheckpointError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(f"the checkpoint was written but does not read back: {error}") from error
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest_checkpoint(root: Path, may_lack: Collection[str] = ()) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole but for files that it ``may_lack``, and why each newer one was
    passed over.

    None if ``root`` holds none.  Raises CheckpointError if there are some but none is whole, or if the
    newest was written by a newer version: going back would lose steps that are not damaged."""
    damaged: list[str] = []
    for folder in _newest_first(root):
        try:
            return read_checkpoint(folder, may_lack), damaged
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(bullet_list(f"no checkpoint in {root} is whole:", damaged))
    return None, []


def clear_partial(root: Path) -> None:
    """Remove what a killed process left half written.  The caller holds the run's lock."""
    for path in root.glob(".step-*.partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path, may_lack: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint whose every byte is what was written, but for files named in ``may_lack`` that are
    gone or damaged: their tensors are left out.  Raises CheckpointError otherwise."""
    manifest, files = _manifest(folder), dict.fromkeys(TENSOR_FILES, NONE)
    for name, mark in sorted(manifest["files"].items()):
        stem = name.removesuffix(".safetensors")
        try:
            files[stem] = _content(folder / name, mark)
        except CheckpointError:
            if stem not in may_lack:
                raise
    try:
        return Checkpoint(
            step=manifest["step"],
            state=json.loads(files[STATE_NAME]),
            version=manifest["schema_version"],
            **{name: tensors_from_bytes(files[name]) for name in TENSOR_FILES},
        )
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _write(tensors: Tensors, path: Path) -> None:
    """From where the tensors lie, without a copy of them all in memory.  Raises OSError."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # which gives the system's error as text
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error


def _manifest(folder: Path) -> dict[str, Any]:
    """What was written into ``folder``: the step, and each file's size and hash."""
    manifest = _read_json(folder / MANIFEST_NAME)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerCheckpointError(
            f"{folder} has schema version {version}; this rankfold reads up to {SCHEMA_VERSION}: update it"
        )
    step, marks = manifest.get("step"), manifest.get("files")
    known = {*NEEDED_FILES, *OLD_FILES, *(f"{name}.safetensors" for name in TENSOR_FILES)}
    if not (
        isinstance(version, int)
        and isinstance(step, int)
        and isinstance(marks, dict)
        and known >= set(marks) >= NEEDED_FILES
    ):
        raise CheckpointError(f"{folder}: its {MANIFEST_NAME} is not one of rankfold's")
    if folder.name != _folder_name(step):
        raise CheckpointError(f"{folder} is not the checkpoint of that step: its {MANIFEST_NAME} says {step}")
    return manifest


def _content(path: Path, mark: Mapping[str, Any]) -> bytes:
    """The content of a file as it was written, or CheckpointError."""
    content = _read(path)
    if _mark(content) != mark:
        raise CheckpointError(f"{path.parent}: {path.name} is damaged: it is not what was written")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} is damaged ({error})") from error
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read: {error.strerror}") from error


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _mark(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _require_finite(checkpoint: Checkpoint) -> None:
    tensors = {**checkpoint.trained, **checkpoint.optimiser}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise TrainingError(bullet_list(f"not saved at step {checkpoint.step}: not finite are", bad))


def _newest_first(root: Path) -> list[Path]:
    """By the step in the name, never by date: clocks go backwards, and copying changes dates."""
    folders = [path for path in root.glob(NAME_PATTERN) if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)
