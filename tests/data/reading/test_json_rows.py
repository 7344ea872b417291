from __future__ import annotations

import json

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading import json_rows as module
from rankfold.data.reading.json_rows import json_rows
from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.text_file import TextFile
from rankfold.errors import DataError

characters = st.characters(exclude_categories=["Cs"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(characters),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(characters), inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(st.text(characters), values, max_size=4), min_size=1, max_size=6)
styles = st.sampled_from([{"indent": None}, {"indent": 1}, {"indent": 4}, {"separators": (",", ":")}])


def read(path) -> list[Row | BadRow]:
    return list(json_rows(TextFile(path), "f"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects, styles, st.booleans())
def test_any_array_is_read_back(tmp_path, rows, style, ascii_only):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=ascii_only, **style), encoding="utf-8", newline="")
    found = read(path)
    assert [row.values for row in found] == rows
    assert len({row.origin for row in found}) == len(rows)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects, st.integers(1, 40))
def test_an_array_is_read_the_same_in_chunks_of_any_size(tmp_path, rows, size):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankfold.data.reading.streams.CHUNK_BYTES", size)
        patch.setattr(module, "CHUNK_BYTES", size)
        if size >= 4:  # the check for UTF-16 looks at the first four bytes
            assert [row.values for row in read(path)] == rows


def test_the_place_is_the_line_on_which_an_object_starts(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n\n {"b":\n  2}, {"c": 3}, {}\n]')
    assert [row.origin for row in read(tmp_path / "a.json")] == ["f:2", "f:4", "f:5", "f:5:17"]


def test_objects_over_several_lines_may_follow_one_another(tmp_path):
    (tmp_path / "a.json").write_text('{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert [(row.values["a"], row.origin) for row in read(tmp_path / "a.json")] == [(1, "f:1"), (2, "f:4")]


@pytest.mark.parametrize("lines", [True, False])
def test_what_pandas_writes_is_read_back(tmp_path, lines):
    frame = pandas.DataFrame({"text": ["é\u2028\n", "b"], "n": [1, 2], "f": [0.5, None]})
    frame.to_json(tmp_path / "a.json", orient="records", lines=lines, force_ascii=False)
    assert [row.values for row in read(tmp_path / "a.json")] == [
        {"text": "é\u2028\n", "n": 1, "f": 0.5},
        {"text": "b", "n": 2, "f": None},
    ]


@pytest.mark.parametrize(
    ("element", "problem"),
    [
        ('{"a": 1, "a": 2}', "key given twice: a"),
        ('{"a": 1e999}', "1e999 is too large"),
        ("[1]", "expected an object like {...}, got list"),
        ("null", "expected an object like {...}, got NoneType"),
    ],
)
@pytest.mark.parametrize("layout", ['[{{"ok": 1}},\n{}, {{"ok": 2}}]', '{{"ok": 1}}\n{}\n{{"ok": 2}}'])
def test_a_bad_element_is_named_and_the_others_are_read(tmp_path, element, problem, layout):
    (tmp_path / "a.json").write_text(layout.format(element))
    first, bad, last = read(tmp_path / "a.json")
    assert (first.values, last.values) == ({"ok": 1}, {"ok": 2})
    assert bad.origin == "f:2"
    assert problem in bad.problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"f:3:7: Expecting ':' delimiter"),
        ('[{"a": 1}\n {"a": 2}]', r"f:2:2: expected ',' or '\]'"),
        ('[{"a": 1},\n]', r"f:2:1: expected an element"),
        ('[{"a": 1},\n{"a": 2}', r"f:2:9: the array does not end"),
        ('[\n{"a": 1}]\n[2]', r"f:3:1: expected nothing more"),
        ('[\n{"a": "b', r"f:2:7: Unterminated string"),
        ('[{"a": ' + "1" * 5000 + "}]", "f:1:2: Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_that_ends_an_array_is_placed(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b'[\n{"a": "\xe4\xbd\xa0\xe9"}]', b'[\n{"\xe4\xbd\xa0": 1}, \xe9]'])
def test_a_damaged_byte_in_an_array_is_named_with_its_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"f:2: not UTF-8 \(byte 0xe9\)"):
        read(tmp_path / "a.json")


def test_a_line_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("rankfold.data.reading.text_file.MAX_LINE_BYTES", 30)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 40 + '"}\n{"a": 3}\n')
    first, bad, last = read(tmp_path / "a.jsonl")
    assert (first.values["a"], last.values["a"]) == (1, 3)
    assert (bad.origin, bad.problem) == ("f:2", "the line has more than 30 bytes")


def test_columns_may_hold_another_type_on_every_line(tmp_path):
    rows = [{"a": "text"}, {"a": ["list"]}, {"a": None}, {"a": 1}, {"b": {}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.values for row in read(tmp_path / "a.jsonl")] == rows


def test_many_keys_cost_no_more_than_their_number(tmp_path):
    row = {f"key {number}": number for number in range(200_000)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl")[0].values == row
