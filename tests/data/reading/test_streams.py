from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard

from rankfold.data.reading import streams
from rankfold.data.reading.streams import chunks, data_suffix, expanded_file
from rankfold.errors import DataError

WRITERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(streams, "FREE_EXPANSION_BYTES", 1_000_000)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(WRITERS[suffix](b"\n" * 5_000_000))
    with pytest.raises(DataError, match="refused as a decompression bomb"):
        list(chunks(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(WRITERS[suffix](os.urandom(5000))[:-200])
    with pytest.raises(DataError, match=f"cannot read .*a.jsonl{suffix} past byte"):
        list(chunks(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_not_compressed_at_all_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="cannot read"):
        list(chunks(path))


def test_an_expanded_file_is_gone_afterwards(tmp_path):
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"hello"))
    with expanded_file(path) as file:
        assert (file.read_bytes(), file.suffix) == (b"hello", ".parquet")
    assert not file.exists()
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.jsonl", ".jsonl"), ("A.JSON.GZ", ".json"), ("a.gz", ""), ("a.csv.zst", ".csv")]
)
def test_the_format_is_told_by_the_inner_suffix(name, suffix):
    assert data_suffix(Path(name)) == suffix
