"""``rankfold.json``: what rankfold must know of an adapter and PEFT's files have no room for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rankfold.errors import AdapterError
from rankfold.files import write_whole

FACTS_NAME = "rankfold.json"
SCHEMA_VERSION = 1

PromptStyle = Literal["chat", "plain"]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """``prompt_style``: "chat" if it was trained in the chat template, "plain" if on running text."""

    prompt_style: PromptStyle = "chat"
    base_description: str = ""
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        write_whole(folder / FACTS_NAME, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> AdapterFacts:
        """The facts of an adapter folder; the defaults where it was written by something else.

        Raises AdapterError for a damaged file or one of a newer rankfold."""
        path = folder / FACTS_NAME
        if not path.is_file():
            return cls()
        try:
            facts = json.loads(path.read_bytes())
            version = facts["schema_version"]
            if version > SCHEMA_VERSION:
                raise AdapterError(
                    f"{path} was written by a newer rankfold (schema {version}); update rankfold"
                )
            style = facts["prompt_style"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"{path} is damaged ({error!r}); remove it to load the adapter without it"
            ) from error
        if style not in ("chat", "plain"):
            raise AdapterError(f"{path}: prompt_style must be 'chat' or 'plain', got {style!r}")
        return cls(prompt_style=style, base_description=str(facts.get("base_description", "")))
