"""Settings that are checked as a whole and answer with rankfold's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rankfold.errors import ConfigError, bullet_list, nearest


class CheckedSettings(BaseModel):
    """Base of every settings object: the only source of its names, defaults, limits, flags and help.

    Build one with ``of`` to get every mistake in one ConfigError."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Check ``options``; raises ConfigError listing every one that is wrong."""
        try:
            return cls(**options)
        except ValidationError as error:
            problems = [cls._describe(problem) for problem in error.errors()]
            raise ConfigError(bullet_list("these settings cannot be used:", problems)) from error

    @classmethod
    def _describe(cls, problem: Mapping[str, Any]) -> str:
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            return f"unknown setting {name!r}{nearest(name, cls.model_fields)}"
        if problem["type"] == "missing":
            return f"{name} is missing: {cls.model_fields[name].description}"
        message = problem["msg"].removeprefix("Value error, ")
        return f"{name}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def split_at_commas(value: object) -> object:
    """``"a, b"`` as the list of its words; anything else as it is.  For a setting that is a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
