"""Prepared rows kept on disk: a run on files that have not changed reads none of them again.

An entry says what was found in the rows and which entry of the token cache holds them (see ``tokens.cache``).
Its name is a hash of the files and of every setting that decides what becomes of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankfold.data.check.balance import Lengths
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.example_store import packed, unpacked
from rankfold.data.shapes.sources import Source, sources_of
from rankfold.data.tokens.cache import CachedRows, encoding_marks, entry_named
from rankfold.errors import OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.train.asked.recipe import Recipe

LAYOUT = 1
FACTS, HELD_OUT = "facts.json", "held_out.jsonl"
LEAST_BYTES = 2_000_000  # smaller files are read in less time than the cache is worth
DECIDING = ("shape", "encoding", "leave_out", "skip_bad", "seed", "max_length", "train_on")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What an entry says: the training rows as tokens, the held-out rows, and what was noticed."""

    train: CachedRows
    held_out: list[Example]
    cut: Lengths
    facts: dict[str, Any]


def kept_name(recipe: Recipe, tokenizer: Any) -> str | None:
    """The name of the entry for these rows; None if they are few, or in no files here."""
    sources = sources_of(recipe.data)
    judged = (
        [] if recipe.held_out is None or isinstance(recipe.held_out, float) else sources_of(recipe.held_out)
    )
    files = _files([*sources, *judged])
    if files is None or sum(path.stat().st_size for path in files) < LEAST_BYTES:
        return None
    marks = {
        "layout": LAYOUT,
        "sources": [repr(sources), repr(judged), repr(recipe.held_out)],
        "settings": {name: repr(getattr(recipe, name)) for name in DECIDING},
        "text": encoding_marks(tokenizer),
        "files": [_hash(path) for path in files],
    }
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()


def _files(sources: Iterable[Source]) -> list[Path] | None:
    found: list[Path] = []
    for source in sources:
        path = Path(source.path).expanduser()
        inner = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if not all(file.is_file() for file in inner):
            return None
        found += inner
    return found


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return f"{path}: {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def read_kept(name: str) -> Kept | None:
    """The entry, or None if there is none, or its tokens are no longer there as they were written."""
    folder = cache_folder() / "rows" / name
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rows = entry_named(facts["tokens"])
        lines = (folder / HELD_OUT).read_bytes().splitlines()
        cut = facts.pop("cut")
        cut = Lengths(**cut | {"bars": [(end, rows) for end, rows in cut["bars"]]})
        if rows is not None:
            return Kept(train=rows.up_to(cut.cut), held_out=[*map(unpacked, lines)], cut=cut, facts=facts)
    return None


def keep(name: str, kept: Kept) -> None:
    """Write the entry, and drop those whose tokens the cache has let go; a place that cannot be written costs
    only the time of reading the rows again."""
    kept_here = cache_folder() / "rows"
    for path in kept_here.glob(f"*/{FACTS}"):
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(path.read_text(encoding="utf-8"))
            if not (cache_folder() / "tokens" / told["tokens"]).is_dir():
                shutil.rmtree(path.parent, ignore_errors=True)
    with suppress(OutputError, OSError), staged_folder(kept_here / name) as folder:
        facts = kept.facts | {"tokens": kept.train.folder.name, "cut": asdict(kept.cut)}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        (folder / HELD_OUT).write_bytes(b"".join(map(packed, kept.held_out)))
