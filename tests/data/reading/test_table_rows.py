from __future__ import annotations

import csv

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.table_rows import table_rows
from rankfold.data.reading.text_file import TextFile
from rankfold.errors import DataError

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
tables = st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6)


def read(path) -> list[Row | BadRow]:
    return list(table_rows(TextFile(path), "f"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, st.sampled_from([("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")]))
def test_any_table_that_pandas_writes_is_read_back(tmp_path, rows, file):
    name, delimiter = file
    frame = pandas.DataFrame(rows, columns=["question", "b", "answer"])
    frame.to_csv(tmp_path / name, sep=delimiter, index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
    assert [tuple(row.values.values()) for row in read(tmp_path / name)] == rows


def test_the_place_is_the_line_on_which_a_row_starts(tmp_path):
    content = 'q,a\r\n"two\r\nlines",1\r\n\r\nplain,"2\n\n3"\r\nlast,4\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert [(row.origin, row.values["q"]) for row in read(tmp_path / "a.csv")] == [
        ("f:2", "two\r\nlines"),
        ("f:5", "plain"),
        ("f:8", "last"),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("only", "1 fields, but the heading has 2: ['q', 'a']"),
        ("1,2,3", "3 fields, but the heading has 2"),
        ('"closed" early,2', "text follows a closing quote"),
        ("a\rb,2", "a carriage return without a line feed"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_others_are_read(tmp_path, row, problem):
    (tmp_path / "a.csv").write_bytes(f'q,a\n"x\ny",1\n{row}\nz,3\n'.encode())
    first, *bad, last = read(tmp_path / "a.csv")
    assert (first.values["q"], last.values["q"], last.origin) == ("x\ny", "z", "f:5")
    assert [found.origin for found in bad] == ["f:4"]
    assert problem in bad[0].problem


def test_a_damaged_byte_is_named_with_line_and_column(tmp_path):
    (tmp_path / "a.csv").write_bytes("q,a\nok,1\n你好caf".encode() + b"\xe9,2\n" + "你,3\n".encode())
    first, bad, last = read(tmp_path / "a.csv")
    assert (first.values["a"], last.values["a"]) == ("1", "3")
    assert bad.origin == "f:3:6"
    assert "not UTF-8 (byte 0xe9); if the file is in another encoding" in bad.problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'q,a\nx,1\n"never closed,2\nz,3\n', "f:3: a quote opens in this row and is never closed"),
        (b"q,q\n1,2\n", r"f:1: the heading names a column twice: \['q'\]"),
        ("你好q".encode() + b"\xff,a\n1,2\n", "f:1:4: not UTF-8"),
    ],
)
def test_what_spoils_the_whole_file_is_an_error(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_a_field_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n" + "x" * 300_000 + ",1\n")
    assert len(read(tmp_path / "a.csv")[0].values["q"]) == 300_000


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n1,2\n", encoding="utf-8-sig")
    assert read(tmp_path / "a.csv")[0].values == {"q": "1", "a": "2"}


def test_a_quote_that_swallows_more_than_a_field_may_hold_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("rankfold.data.reading.table_rows.MAX_LINE_BYTES", 200_000)
    (tmp_path / "a.csv").write_text('q,a\nx,1\n"open,2\n' + "z,3\n" * 60_000)
    usual = csv.field_size_limit()
    with pytest.raises(DataError, match="f:3: a quote opens in this row and is never closed"):
        read(tmp_path / "a.csv")
    assert csv.field_size_limit() == usual
