from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.rows import read_rows
from rankfold.errors import DataError

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text())
objects = st.dictionaries(st.text(), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(objects, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_any_objects_are_read_back_with_their_lines(tmp_path, rows, newline, mark):
    path = tmp_path / "rows.jsonl"
    text = newline.join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8", "surrogatepass"))
    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    read = read_rows(path)
    assert [row.values for row in read] == rows
    step = 2 if newline == "\n\n" else 1
    assert [row.origin for row in read] == [f"{path}:{1 + step * place}" for place in range(len(rows))]


def test_a_line_separator_inside_a_string_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl")[0].values["text"] == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a" "completion": "b"}', r":2:16: Expecting ',' delimiter: .*\"completion\""),
        (b'{"prompt": "a', r":2:12: Unterminated string"),
        (b"[1, 2]", r":2: expected an object like \{\.\.\.\}, got list: \[1, 2\]"),
        (b'{"a": 1, "a": 2}', r":2: key given twice: a"),
        (b'{"a": NaN}', r":2: NaN is not JSON"),
        (b'{"a": "\xff"}', r":2:8: not UTF-8 \(byte 0xff\)"),
        (b'{"a": ' + b"[" * 100_000, r":2: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", r":2: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_with_line_column_and_excerpt(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"ok": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_all_bad_lines_are_told_at_once(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"ok": 1}\n{\n{"ok": 2}\n}\n')
    with pytest.raises(DataError, match=r"2 of the rows(.|\n)*jsonl:2:(.|\n)*jsonl:4:"):
        read_rows(tmp_path / "bad.jsonl")


def test_utf16_is_not_taken_for_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "b"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "a.jsonl")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="no such data file: .*nope.jsonl"):
        read_rows(tmp_path / "nope.jsonl")
    with pytest.raises(DataError, match="holds no data files"):
        read_rows(tmp_path)
