"""Every example in the documents runs as written, and a page in two languages says the same in both.

A ``python`` block runs in the namespace of its page; the ``$ rankfold`` and ``$ torchrun`` lines of a
``console`` block run as commands; a block ``jsonl NAME`` is written to that file first.  A ``text`` block
after a python block is what it must print.  ``<!-- slow -->`` before one leaves it to ``make test-all``."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from conftest import rankfold_command, torchrun

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
RUN_PAGES = [page for page in PAGES if page not in CHINESE]  # a Chinese page's examples are the English one's
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Block:
    """A fenced block: its language, the words after it, its text, and where it stands."""

    language: str
    words: list[str]
    text: str
    place: str
    slow: bool


def blocks(page: Path) -> Iterator[Block]:
    slow = False
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, *words = token.info.split() or [""]
            yield Block(language, words, token.content, f"{page.name}:{token.map[0] + 1}", slow)
        if token.type in ("fence", "html_block"):
            slow = "<!-- slow -->" in token.content


def require_match(wanted: str, got: str, place: str) -> None:
    assert doctest.OutputChecker().check_output(wanted, got, OPTIONS), f"{place} prints:\n{got}"


def run_console(block: Block) -> None:
    """Run each such line; what follows it, up to the next ``$``, is what it must print, on
    standard error and with exit status 2 if that begins with ``error:``."""
    for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, wanted = entry.partition("\n")
        program, *arguments = shlex.split(line, comments=True)
        if program in ("rankfold", "torchrun"):
            run = rankfold_command(*arguments) if program == "rankfold" else torchrun(*arguments)
            fails = wanted.startswith("error:")
            assert run.returncode == (2 if fails else 0), f"{block.place}: {line}: {run.stderr}"
            if wanted.strip():
                require_match(wanted, run.stderr if fails else run.stdout, block.place)


def run_page(page: Path, capsys: pytest.CaptureFixture[str], *, with_slow: bool) -> None:
    names: dict[str, object] = {}
    printed = None
    for block in blocks(page):
        if block.slow and not with_slow:
            printed = None
        elif block.language == "python":
            capsys.readouterr()
            exec(compile(block.text, block.place, "exec"), names)
            printed = capsys.readouterr().out
            continue
        elif block.language == "text" and printed is not None:
            require_match(block.text, printed, block.place)
        elif block.language == "console":
            run_console(block)
        elif block.language in ("jsonl", "yaml"):
            Path(block.words[0]).write_text(block.text, encoding="utf-8")
        printed = None


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_as_written(page, tmp_path, capsys):
    with chdir(tmp_path):
        run_page(page, capsys, with_slow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page", [page for page in RUN_PAGES if any(b.slow for b in blocks(page))], ids=lambda page: page.name
)
def test_the_slow_examples_of_a_page_run_as_written(page, tmp_path, capsys):
    with chdir(tmp_path):
        run_page(page, capsys, with_slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_are_of_a_kind_that_is_checked(page):
    kinds = {block.language for block in blocks(page)}
    assert kinds <= {"python", "console", "text", "jsonl", "yaml"}


def test_readme_and_tutorial_are_there_in_chinese():
    assert {page.name for page in CHINESE} >= {"README.zh-CN.md", "tutorial.zh-CN.md"}


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda page: page.name)
def test_a_page_in_two_languages_has_the_same_examples_headings_and_numbers(chinese):
    pages = [chinese.with_name(chinese.name.replace(".zh-CN", "")), chinese]
    examples = [[(b.language, b.words, b.text, b.slow) for b in blocks(page)] for page in pages]
    assert examples[0] == examples[1]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    levels, links, numbers = (
        [re.findall(pattern, text, flags=re.MULTILINE) for text in texts]
        for pattern in (r"^#+ ", r"\]\(([^)#]+)\)", r"\d+(?:[.,]\d+)*")
    )
    assert levels[0] == levels[1]
    names = {page.name for page in pages}
    assert sorted(set(links[0]) - names) == sorted(set(links[1]) - names)
    assert sorted(numbers[0]) == sorted(numbers[1])


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"`?make ([a-z-]+)\b", page.read_text(encoding="utf-8"))) <= targets, page


def test_the_compatibility_page_says_what_the_marks_of_the_tests_say():
    """``make compatibility`` writes the page anew."""
    marks = re.compile(r"""pytest\.mark\.peft\(\s*(['"])(.*?)\1,""")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    features = {feature.replace("\\", "") for _, feature in marks.findall(tests)}
    page = (ROOT / "docs" / "peft-compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| .*`(.+?) (test_\w+)` \|$", page, flags=re.MULTILINE)
    assert {feature for feature, _, _ in rows} == features
    for _, path, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")
