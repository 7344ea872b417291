from __future__ import annotations

import datetime
import zipfile

import pytest
import xlsxwriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading import sheet_rows as module
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.sheet_rows import sheet_rows
from rankfold.errors import DataError

# XML 1.0 has no room for other control characters, and Excel writes \r as an escape of its own.
cells = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]) | st.sampled_from("\n\t"),
    min_size=1,
    max_size=30,
)
tables = st.lists(st.tuples(cells, st.none() | st.integers(-(2**50), 2**50) | st.booleans()), max_size=5)


def write(path, sheets) -> None:
    book = xlsxwriter.Workbook(path, {"strings_to_formulas": False, "strings_to_urls": False})
    for name, rows in sheets.items():
        sheet = book.add_worksheet(name)
        for number, row in enumerate(rows):
            for place, value in enumerate(row):
                if isinstance(value, str):
                    sheet.write_string(number, place, value)
                elif value is not None:
                    sheet.write(number, place, value)
    book.close()


def read(path) -> list[Row | BadRow]:
    return list(sheet_rows(path, "f"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables)
def test_any_table_is_read_back_as_it_is_shown(tmp_path, rows):
    write(tmp_path / "a.xlsx", {"Sheet": [("question", "answer"), *rows]})
    shown = [(words, None if value is None else str(value).upper()) for words, value in rows]
    found = read(tmp_path / "a.xlsx")
    assert [(row.values["question"], row.values["answer"]) for row in found] == shown
    assert [bool(row.notes) for row in found] == [value is not None for _, value in rows]


def test_every_sheet_is_read_and_empty_rows_are_passed_over(tmp_path):
    write(tmp_path / "a.xlsx", {"One": [("q", "a"), ("x", "1"), (), ("y", None)], "Two": [("q",), ("z",)]})
    assert [(row.origin, row.values) for row in read(tmp_path / "a.xlsx")] == [
        ("f:One:2", {"q": "x", "a": "1"}),
        ("f:One:4", {"q": "y", "a": None}),
        ("f:Two:2", {"q": "z"}),
    ]


def test_a_date_becomes_iso_text(tmp_path):
    book = xlsxwriter.Workbook(tmp_path / "a.xlsx")
    sheet = book.add_worksheet()
    sheet.write(0, 0, "when")
    sheet.write_datetime(1, 0, datetime.datetime(2026, 5, 4), book.add_format({"num_format": "yyyy-mm-dd"}))
    book.close()
    assert read(tmp_path / "a.xlsx")[0].values == {"when": "2026-05-04"}


def test_a_formula_counts_with_its_result_and_a_failed_one_is_a_bad_row(tmp_path):
    book = xlsxwriter.Workbook(tmp_path / "a.xlsx")
    sheet = book.add_worksheet("S")
    sheet.write(0, 0, "n")
    sheet.write_formula(1, 0, "=1+1", None, 2)
    sheet.write_formula(2, 0, "=NA()", None, "#N/A")
    sheet.write(3, 3, "beyond")
    book.close()
    good, failed, wide = read(tmp_path / "a.xlsx")
    assert good.values == {"n": "2"}
    assert (failed.origin, failed.problem) == ("f:S:3", "a formula failed: A3 is #N/A")
    assert (wide.origin, wide.problem) == ("f:S:4", "4 cells, but the heading has 1: ['n']")


@pytest.mark.parametrize("content", [b"not a zip", b"PK\x03\x04" + b"\0" * 40])
def test_what_is_no_workbook_is_an_error(tmp_path, content):
    (tmp_path / "a.xlsx").write_bytes(content)
    with pytest.raises(DataError, match="f: not a readable xlsx workbook"):
        read(tmp_path / "a.xlsx")


def test_a_zip_that_is_no_workbook_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(DataError, match="f: not a readable xlsx workbook"):
        read(tmp_path / "a.xlsx")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FREE_EXPANSION_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", b" " * 5_000_000)
    with pytest.raises(DataError, match="refused as a decompression bomb"):
        read(tmp_path / "a.xlsx")
