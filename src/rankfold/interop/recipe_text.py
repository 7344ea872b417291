"""An imported recipe as YAML, with the place that each setting comes from."""

from __future__ import annotations

from pathlib import Path

import yaml

from rankfold.errors import OutputError
from rankfold.files import write_whole
from rankfold.interop.xtuner import Imported


def recipe_text(imported: Imported, config: Path) -> str:
    """One setting after another, each behind the places of the values that became it."""
    parts = [f"# from {config.name}, by rankfold import; say --out to train\n"]
    for name, value in imported.settings.items():
        places = list(dict.fromkeys(line.place for line in imported.lines if line.setting == name))
        told = yaml.safe_dump({name: value}, allow_unicode=True, sort_keys=False)
        parts.append(f"# {', '.join(places) or 'as there, without being said'}\n{told}")
    return "".join(parts)


def write_recipe(imported: Imported, config: Path, out: Path) -> None:
    """Raises OutputError if ``out`` is there already or cannot be written."""
    if out.exists():
        raise OutputError(f"{out} exists; name a new file for the recipe, or remove it first")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}, where {out.name} belongs, is no folder")
    write_whole(out, recipe_text(imported, config))
