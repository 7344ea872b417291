from __future__ import annotations

import json
import os
from pathlib import Path

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading.rows import Row, read_rows, stream_rows
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
        ('{"a": "你好'.encode() + b'\xff"}', r":2:10: not UTF-8 \(byte 0xff\)"),
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


def test_bad_rows_may_be_left_out_up_to_a_share_and_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ok": 1}\n{"ok": 2}\nnonsense\n{"ok": 3}\n')
    rows = read_rows(tmp_path / "a.jsonl", skip_bad=0.25)
    assert [row.values["ok"] for row in rows] == [1, 2, 3]
    assert [row.origin for row in rows.bad] == [f"{tmp_path}/a.jsonl:3:1"]
    with pytest.raises(DataError, match=r"1 of the rows in (.|\n)*more than 20 % of 4(.|\n)*a\.jsonl:3"):
        read_rows(tmp_path / "a.jsonl", skip_bad=0.2)


def test_only_bad_rows_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "a.jsonl", skip_bad=1.0)


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"question": 'é, "q"\nx', "answer": "1\t2"}, {"question": "b", "answer": "c"}]
    frame = pandas.DataFrame(rows)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "b.json", orient="records", indent=2)
    frame.to_csv(tmp_path / "c.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "e.parquet")
    frame.to_feather(tmp_path / "f.arrow")
    frame.to_excel(tmp_path / "g.xlsx", index=False, engine="xlsxwriter")
    frame.to_json(tmp_path / "h.jsonl.gz", orient="records", lines=True)
    frame.to_csv(tmp_path / "i.csv.zst", index=False)
    for path in sorted(tmp_path.iterdir()):
        assert [row.values for row in read_rows(path)] == rows, path
    assert len(read_rows(tmp_path)) == 9 * len(rows)


def test_a_folders_text_files_are_read_only_if_there_are_no_rows_beside_them(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("README.md", "inner/b.txt", ".hidden.txt", "inner/picture.png"):
        (tmp_path / name).write_text(name)
    assert [row.values["text"] for row in read_rows(tmp_path)] == ["README.md", "inner/b.txt"]
    (tmp_path / "inner" / "a.jsonl").write_text('{"a": 1}\n')
    for name in ("dataset_info.json", "cache-0.arrow"):
        (tmp_path / name).write_text("{}")
    assert [row.values for row in read_rows(tmp_path)] == [{"a": 1}]


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", Path("/dev/zero")):
        with pytest.raises(DataError, match="is a pipe or a device"):
            stream_rows(path)
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a pipe or a device"):
        stream_rows(tmp_path / "link.jsonl")


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jsonl", "s3://bucket/a", "file:///etc/passwd", "hf://x/y"]
)
def test_urls_are_refused(url):
    with pytest.raises(DataError, match="is a URL; nothing is fetched from one"):
        stream_rows(url)
    with pytest.raises(DataError, match="is a URL; nothing is fetched from one"):
        stream_rows(Path(url))


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "a/b/c",
        "a/rows.jsonl",
        "a/rows.csv.gz",
        "../x/y",
        "a b/c",
        "",
        " ",
        "here:x",
        "~nobody/a",
        "a\0",
        "x" * 9999,
    ],
)
def test_what_is_neither_a_path_nor_a_hub_name_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match="no such data file"):
        stream_rows(name)


def test_a_missing_file_beside_a_similar_one_names_it(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean '.*train\.jsonl'"):
        stream_rows(tmp_path / "tran.jsonl")


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"cannot tell the format.*\.jsonl"):
        stream_rows(tmp_path / "a.doc")


def test_a_file_is_read_as_a_stream(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    rows = stream_rows(str(tmp_path / "a.jsonl"))
    assert next(rows) == Row({"a": 1}, f"{tmp_path}/a.jsonl:1", str(tmp_path))
    assert next(rows).origin == f"{tmp_path}/a.jsonl:2:1"
    assert next(rows).values == {"a": 2}


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sound")
    frame = pandas.DataFrame([{"question": f"é{number}", "answer": "a\nb"} for number in range(20)])
    frame.to_json(folder / "a.jsonl", orient="records", lines=True)
    frame.to_json(folder / "b.json", orient="records", indent=2)
    frame.to_csv(folder / "c.csv", index=False)
    frame.to_parquet(folder / "e.parquet")
    frame.to_feather(folder / "f.arrow", compression="uncompressed")
    frame.to_excel(folder / "g.xlsx", index=False, engine="xlsxwriter")
    frame.to_json(folder / "h.jsonl.gz", orient="records", lines=True)
    frame.to_csv(folder / "i.csv.zst", index=False)
    (folder / "j.txt").write_text("é\n\nb")
    return sorted(folder.iterdir())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_rows_or_an_error_in_words(tmp_path, sound_files, data):
    sound = data.draw(st.sampled_from(sound_files))
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / sound.name
    path.write_bytes(content)
    try:
        rows = list(stream_rows(path))
    except DataError as error:
        rows = [str(error)]
    assert all(rows)
