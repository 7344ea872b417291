"""Recipes on disk: read, written with every choice made, and changed when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rankfold.data.shapes.sources import Source, sources_of
from rankfold.errors import ConfigError, bullet_list
from rankfold.train.asked.advise import Settings
from rankfold.train.asked.recipe import Recipe

CHANGEABLE = {
    "max_minutes",
    "patience",
    "sample_every_steps",
    "samples",
    "trackers",
    "save_every_steps",
    "keep_checkpoints",
}  # without becoming another run


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ConfigError with line and column for what cannot be read."""
    try:
        value = _OneValueEach(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a recipe in YAML: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} is not a recipe: wanted lines like `rank: 16`")
    return value


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """``["rank=8", "epochs=2"]`` as settings; raises ConfigError for words of another form."""
    pairs = [word.partition("=") for word in words]
    wrong = [word for word, equals, _ in pairs if not (word.isidentifier() and equals)]
    if wrong:
        raise ConfigError(f"wanted words like rank=8, got {', '.join(wrong)}")
    return {name: value for name, _, value in pairs}


def resolved_recipe(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """``recipe`` with every choice made and every path absolute, so that training by it again, from
    wherever, makes the same run."""
    chosen = {name: value for name, value in asdict(settings).items() if name in Recipe.model_fields}
    places: dict[str, Any] = {"model": _absolute(recipe.model), "data": _absolute_data(recipe.data)}
    if recipe.adapter is not None:
        places["adapter"] = _absolute(recipe.adapter)
    if recipe.held_out is not None and not isinstance(recipe.held_out, float):
        places["held_out"] = _absolute_data(recipe.held_out)
    return recipe.model_dump(mode="json", exclude_none=True) | places | chosen


def _absolute(name: str | Path) -> str:
    """A path that is there as an absolute one; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else str(name)


def _absolute_data(data: str | Path | list[Source]) -> Any:
    sources = sources_of(data)
    if len(sources) == 1 and not isinstance(data, list):
        return _absolute(data)
    return [_absolute_source(source) for source in sources]


def _absolute_source(source: Source) -> dict[str, Any]:
    told = {name: value for name, value in asdict(source).items() if value not in (None, "", ())}
    return told | {name: _absolute(told[name]) for name in ("path", "images") if name in told}


def changed_recipe(saved: Mapping[str, Any], changes: Mapping[str, Any], out: Path) -> Recipe:
    """The recipe of the run in ``out`` with ``changes``; raises ConfigError listing every change that would
    make it another run."""
    before = Recipe.of({**saved, "out": out})
    after = Recipe.of({**saved, **changes, "out": out})
    refused = [
        f"{name}: {getattr(before, name)} -> {getattr(after, name)}"
        for name in Recipe.model_fields
        if getattr(before, name) != getattr(after, name) and name not in CHANGEABLE
    ]
    if refused:
        may = ", ".join(sorted(CHANGEABLE))
        raise ConfigError(
            bullet_list(
                f"these changes would make it another run; on resuming you may change {may}:", refused
            )
        )
    return after


class _OneValueEach(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice!r} is given twice", problem_mark=node.start_mark)
        return node
