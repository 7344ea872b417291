from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data import streams
from rankfold.data.streams import chunks, data_suffix, expanded_file, lines
from rankfold.errors import DataError

WRITERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400).filter(lambda b: b"\0" not in b[:4]), st.sampled_from(sorted(WRITERS)))
def test_the_lines_of_any_bytes_are_those_between_line_feeds(tmp_path, content, suffix):
    if content[:2] in streams.UTF16_MARKS:
        return
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(WRITERS[suffix](content))
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(lines(path)) == list(enumerate(expected, start=1))


def test_lines_do_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 3)
    (tmp_path / "a").write_bytes(b"ab\ncdefghij\n\nk")
    assert list(lines(tmp_path / "a")) == [(1, b"ab"), (2, b"cdefghij"), (3, b""), (4, b"k")]


def test_a_line_that_is_too_long_is_passed_over_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 3)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 5)
    (tmp_path / "a").write_bytes(b"ab\n" + b"x" * 40 + b"\ncd\n" + b"y" * 9)
    assert list(lines(tmp_path / "a")) == [(1, b"ab"), (2, None), (3, b"cd"), (4, None)]


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


LONG_LINE = """
import resource, sys
from pathlib import Path
from rankfold.data.streams import lines
resource.setrlimit(resource.RLIMIT_AS, (600_000_000, 600_000_000))
print([(number, line is None) for number, line in lines(Path(sys.argv[1]))])
"""


def test_a_line_of_200_megabytes_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b"\n{}\n")
    run = subprocess.run(
        [sys.executable, "-c", LONG_LINE, path], capture_output=True, text=True, check=True, env=os.environ
    )
    assert run.stdout == "[(1, True), (2, False)]\n"
