from __future__ import annotations

import gzip
import os
import subprocess
import sys

import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading import streams, text_file
from rankfold.data.reading.text_file import TextFile

WRITERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=200).filter(lambda text: "\0" not in text[:4]).map(str.encode),
    st.sampled_from(sorted(WRITERS)),
)
def test_the_lines_of_any_bytes_are_those_between_line_feeds(tmp_path, content, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(WRITERS[suffix](content))
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(TextFile(path).lines()) == list(enumerate(expected, start=1))


def test_lines_do_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 3)
    (tmp_path / "a").write_bytes(b"ab\ncdefghij\n\nk")
    assert list(TextFile(tmp_path / "a").lines()) == [(1, b"ab"), (2, b"cdefghij"), (3, b""), (4, b"k")]


def test_a_line_that_is_too_long_is_passed_over_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 3)
    monkeypatch.setattr(text_file, "MAX_LINE_BYTES", 5)
    (tmp_path / "a").write_bytes(b"ab\n" + b"x" * 40 + b"\ncd\n" + b"y" * 9)
    assert list(TextFile(tmp_path / "a").lines()) == [(1, b"ab"), (2, None), (3, b"cd"), (4, None)]


LONG_LINE = """
import resource, sys
from pathlib import Path
from rankfold.data.reading.text_file import TextFile
resource.setrlimit(resource.RLIMIT_AS, (600_000_000, 600_000_000))
print([(number, line is None) for number, line in TextFile(Path(sys.argv[1])).lines()])
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
