"""A config inside the config of LoRA: an object, or a dictionary of its options, checked as a whole."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rankfold.errors import ConfigError, nearest

Limits = Mapping[str, tuple[float, float]]
Choices = Mapping[str, tuple[str, ...]]


@dataclass
class SubConfig:
    """Checks its fields by their defaults' types.  Raises ConfigError listing all that cannot be meant."""

    limits: ClassVar[Limits] = {}
    choices: ClassVar[Choices] = {}
    words: ClassVar[Mapping[str, str]] = {}  # PEFT's, for some fields
    # Fields whose default None says nothing of their type: lists of names, counts; the others are paths.
    names: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), os.PathLike):
                setattr(self, field.name, os.fspath(value))
        problems = [text for field in dataclasses.fields(self) for text in self._wrong(field)]
        if problems:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(problems)}")

    def _wrong(self, field: dataclasses.Field[Any]) -> list[str]:
        value, name = getattr(self, field.name), field.name
        low, high = self.limits.get(name, (-math.inf, math.inf))
        if name in self.choices:
            fits, wanted = value in self.choices[name], f"one of {', '.join(self.choices[name])}"
        elif field.default is None:
            fits, wanted = value is None or self._fits_none(name, value), "a path or None"
            wanted = "a list of names or None" if name in self.names else wanted
            wanted = "a whole number or None" if name in self.counts else wanted
        elif isinstance(field.default, bool):
            fits, wanted = isinstance(value, bool), "True or False"
        else:
            kinds = (int,) if isinstance(field.default, int) else (int, float)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            fits = number and math.isfinite(value) and low <= value <= high
            wanted = "a whole number" if kinds == (int,) else "a number"
            wanted += f" of at least {low:g}" if low > -math.inf else ""
            wanted += f" and at most {high:g}" if high < math.inf else ""
        own = self.words.get(name)
        text = own.format(value) if own else f"{name} must be {wanted}, got {value!r:.200}"
        return [] if fits else [text]

    def _fits_none(self, name: str, value: object) -> bool:
        if name in self.names:
            return isinstance(value, list) and all(isinstance(each, str) for each in value)
        return isinstance(value, int if name in self.counts else str)


def sub_config(kind: type[SubConfig], given: object) -> SubConfig:
    """``given``, a dictionary of options or an object of ``kind`` or of PEFT's class of that name, as a
    ``kind`` of its own.  Raises ConfigError."""
    if dataclasses.is_dataclass(given) and type(given).__name__ == kind.__name__:
        given = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"`{kind.__name__}` must be a `{kind.__name__}`, a dict, or None. Got {given!r:.200}"
        )
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [f"unknown option {name!r}{nearest(str(name), known)}" for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{kind.__name__}: {'; '.join(unknown)}")
    return kind(**given)
