from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading import text_rows as module
from rankfold.data.reading.text_file import TextFile
from rankfold.data.reading.text_rows import PASSAGE_CHARS, text_rows

paragraph = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1
)
paragraphs = st.lists(paragraph.filter(str.strip).map(str.strip), min_size=1, max_size=8)


def read(path) -> list:
    return list(text_rows(TextFile(path), "f"))


def test_a_short_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n# Title\n\nOne.\nTwo.\r\n\n\nThree.\n\n")
    (row,) = read(tmp_path / "a.txt")
    assert row.values == {"text": "# Title\n\nOne.\nTwo.\n\n\nThree."}
    assert row.origin == "f:3"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paragraphs, st.integers(5, 60))
def test_passages_lose_no_word_and_keep_their_length(tmp_path, parts, most):
    content = "\n\n".join(parts)
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PASSAGE_CHARS", most)
        rows = read(tmp_path / "a.txt")
    assert "".join("".join(row.values["text"] for row in rows).split()) == "".join(content.split())
    assert all(len(row.values["text"]) <= most for row in rows)


def test_a_long_file_is_cut_between_paragraphs(tmp_path):
    parts = [f"paragraph {number}\n" + "x" * 700 for number in range(7)]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    rows = read(tmp_path / "a.txt")
    assert "\n\n".join(row.values["text"] for row in rows) == "\n\n".join(parts)
    assert [row.origin for row in rows] == ["f:1", "f:7", "f:13", "f:19"]


def test_a_long_paragraph_is_cut_at_lines_and_a_long_line_at_spaces(tmp_path):
    line = " ".join(["word"] * 900)
    (tmp_path / "a.txt").write_text(f"{line}\nshort\n")
    rows = read(tmp_path / "a.txt")
    assert all(len(row.values["text"]) <= PASSAGE_CHARS for row in rows)
    assert all(set(row.values["text"].split()) <= {"word", "short"} for row in rows)
    assert rows[-1].values["text"].endswith("short")


def test_a_damaged_byte_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one 你好\n\ncaf".encode() + b"\xe9\n")
    bad, good = sorted(read(tmp_path / "a.txt"), key=lambda row: hasattr(row, "values"))
    assert (bad.origin, good.values["text"]) == ("f:3:4", "one 你好")
    assert "not UTF-8" in bad.problem


def test_a_line_of_megabytes_is_cut_in_time_that_grows_with_its_length(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 40_000_000)
    assert len(read(tmp_path / "a.txt")) == 40_000_000 // PASSAGE_CHARS


def test_white_space_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one" + "\n" * 5000 + " " * 5000 + "\n\t\ntwo\n" + " " * 3000)
    assert [row.values["text"] for row in read(tmp_path / "a.txt") if not row.values["text"].strip()] == []
