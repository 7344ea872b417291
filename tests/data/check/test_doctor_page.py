from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rankfold.data.check.balance import Lengths
from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.check.doctor_page import histogram, render_page

ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7*7 }}\"'>"


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def attacked(folder: Path, model: str | None = None) -> str:
    """The page of a file whose name, words, labels, roles and keys are all an attack."""
    path = folder / "<b onclick=x>.jsonl"
    rows = [
        {"prompt": f"{ATTACK} <s> jane@mail.example", "completion": f"{ATTACK} and more"},
        {"text": f"{ATTACK} number one", "label": ATTACK},
        {ATTACK: 1, "other": 2},
        {"messages": [{"role": ATTACK, "content": "x"}]},
        {"prompt": ATTACK, "completion": ""},
        {"prompt": "look: <image>", "completion": "a cat", "images": [ATTACK]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + f"{ATTACK}\n")
    options = {"model": model, "show": 3} if model else {}
    return render_page(check(CheckRequest.of({"data": str(path), **options})))


@pytest.mark.parametrize("with_model", [False, True])
def test_nothing_in_a_row_becomes_markup(tmp_path, tiny_folder, with_model):
    page = attacked(tmp_path, str(tiny_folder) if with_model else None)
    seen = Seen(page)
    assert not seen.tags & {"script", "img", "b", "iframe", "link", "a", "object"}
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert "<img src=x onerror=alert(1)>" in seen.text
    assert "{{ 7*7 }}" in seen.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = attacked(tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("</", ""))


def test_the_page_masks_personal_data_and_shows_every_state(tmp_path):
    seen = Seen(attacked(tmp_path))
    assert "jane@mail" not in seen.text
    assert "[e-mail]" in seen.text
    for word in ("kept", "cut", "dropped", "Training would stop"):
        assert word in seen.text


def test_the_page_does_not_grow_with_the_rows(tmp_path):
    sizes = []
    for rows in (100, 3000):
        path = tmp_path / f"{rows}.jsonl"
        bad = '{"prompt": "a@mail.example <s>", "completion": ""}\n{"label": "%d", "text": "words %d"}\nx\n'
        path.write_text("".join(bad % (row, row) for row in range(rows)))
        sizes.append(len(render_page(check(CheckRequest.of({"data": str(path)})))))
    assert sizes[1] < 1.1 * sizes[0] < 60_000


def test_the_histogram_has_a_bar_for_every_count_and_marks_what_is_over_the_cut():
    lengths = Lengths(
        unit="tokens", shortest=1, median=5, mean=5.0, percentile_99=20, longest=90, total=100,
        cut=20, over=3, reason="as asked", bars=[(10, 7), (20, 0), (30, 2), (90, 1)],
    )  # fmt: skip
    picture = str(histogram(lengths))
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', picture)]
    assert heights[0] == max(heights)
    assert heights[1] == 0
    assert heights[2] == pytest.approx(heights[0] * 2 / 7, abs=0.1)
    assert picture.count("#e0a526") == 2
