"""Every page that is written: whole by itself, and as axe-core and a phone want it (``make pages``)."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import rankfold_command
from in_chromium import AXE, CHROMIUM, DESK, PHONE, looked_at
from rankfold.pages import render

LONG = "a_word_without_any_place_to_break_it_" * 4
PAGES = ("run", "runs", "eval", "check")


@pytest.fixture(scope="module")
def pages(tiny_folder, tmp_path_factory) -> dict[str, str]:
    """One of each kind, of rows with long words, markup and other scripts."""
    folder = tmp_path_factory.mktemp("pages")
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for n in range(30):
            label = ("warm", "cold")[n % 2]
            file.write(f'{{"text": "Is {n} <b>warm</b> & {LONG} 你好 {n}?", "label": "{label}"}}\n')
    made = {name: folder / name for name in ("first", "second", "runs", "eval")}
    for name, rate in (("first", "1e-2"), ("second", "1e-9")):
        given = ("--model", tiny_folder, "--data", rows, "--out", made[name], "--learning-rate", rate)
        _done("train", *given, "--max-steps", 4, "--max-length", 500)
    _done("report", made["first"], made["second"], "--out", made["runs"])
    _done("eval", made["first"], made["second"], "--data", rows, "--rows", 8, "--out", made["eval"])
    _done("check", rows, "--html", folder / "check.html")
    files = {"run": made["second"], "runs": made["runs"], "eval": made["eval"]}
    read = {name: (path / "report.html").read_text(encoding="utf-8") for name, path in files.items()}
    return read | {"check": (folder / "check.html").read_text(encoding="utf-8")}


def _done(*arguments: object) -> None:
    done = rankfold_command(*arguments)
    assert done.returncode in (0, 1), done.stderr


class Page(HTMLParser):
    """What a page loads, and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        links = [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        scripts = [tag] if tag in ("script", "link", "iframe") else []
        self.loads += links + scripts + [name for name, _ in attributes if name.startswith("on")]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_loads_nothing_and_escapes_what_rows_say(pages, kind):
    page = Page(pages[kind])
    assert page.loads == []
    assert "<b>warm</b>" not in pages[kind]
    assert page.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert "prefers-color-scheme: dark" in pages[kind]


@pytest.mark.skipif(not (CHROMIUM and AXE), reason="needs Chromium, and RANKFOLD_AXE: make pages")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_nothing_and_no_page_is_wider_than_its_window(pages, kind, width, dark, tmp_path):
    found = looked_at(pages[kind], tmp_path, width, dark)
    assert found["violations"] == []
    assert found["passes"] > 20
    assert found["wide"] <= 0


@pytest.mark.skipif(not (CHROMIUM and AXE), reason="needs Chromium, and RANKFOLD_AXE: make pages")
def test_axe_finds_what_is_wrong(tmp_path: Path):
    """Else the test above could not fail."""
    body = '<p style="color:#ccc">pale</p><img src="a.png">'
    page = f"<html><head><title>x</title></head><body>{body}</body></html>"
    found = {each["id"] for each in looked_at(page, tmp_path)["violations"]}
    assert {"color-contrast", "image-alt", "html-has-lang"} <= found


def test_a_template_with_a_name_that_is_not_given_fails():
    with pytest.raises(Exception, match="undefined"):
        render("rankfold.train.comparing", "page.html.j2", ())
