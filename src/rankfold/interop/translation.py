"""What the values of a config become in a recipe, one line for each, so that none is lost in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from rankfold.interop.python_values import Found, PythonValues, Unread, leaves

PART = "other values were worked out from it"
UNKNOWN = "nothing here goes by that name: see whether it matters"
LONGEST = 60  # letters of a value in a line


@dataclass(frozen=True)
class Line:
    """One value of the config: where it stands, its dotted name, the value in words, the setting that it
    became (empty if none), and the reason or a remark."""

    place: str
    name: str
    value: str
    setting: str
    why: str


@dataclass
class Translation:
    """The ``settings`` so far.  ``became`` tells for a value, by its identity, the setting and a remark; all
    other values are left out, for the reason that the first fitting pattern of ``left_out`` gives."""

    values: PythonValues
    left_out: Mapping[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    became: dict[int, tuple[str, str]] = field(default_factory=dict)

    def at(self, path: str) -> Found | None:
        """The value at a dotted path, or None."""
        found: Found | None = Found(self.values.values, "")
        for key in path.split("."):
            inside = found.value if found is not None else None
            if isinstance(inside, dict):
                found = inside.get(key)
            elif isinstance(inside, list) and key.isdigit() and int(key) < len(inside):
                found = inside[int(key)]
            else:
                return None
        return found

    def plain(self, path: str) -> Any:
        """The plain value at a path; None if there is none."""
        found = self.at(path)
        return None if found is None else found.plain

    def number(self, path: str) -> float | int | None:
        value = self.plain(path)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def listed(self, path: str) -> list[Any]:
        """The items at a path: of a list, or one, or none."""
        plain = self.plain(path)
        return plain if isinstance(plain, list) else [] if plain is None else [plain]

    def set(self, setting: str, value: Any, *paths: str, why: str = "") -> None:
        """``setting`` becomes ``value`` because of the values at ``paths``."""
        self.settings[setting] = value
        for path in paths:
            self.mark(path, setting, why)

    def mark(self, path: str, setting: str, why: str = "") -> None:
        if (found := self.at(path)) is not None:
            self.became[id(found)] = (setting, why)

    def explain(self, path: str, why: str) -> None:
        """The value at ``path`` becomes nothing, for a reason of this config's own."""
        if (found := self.at(path)) is not None:
            self.became.setdefault(id(found), ("", why))

    def lines(self) -> list[Line]:
        """What became of every value, in the order in which they stand."""
        named = [leaf for name, found in self.values.values.items() for leaf in leaves(found, name)]
        parts = {id(found) for found in self.values.parts}
        inside = {id(found): name for name, found in reversed(named) if "." in name}
        lines: dict[int, Line] = {}
        for name, found in named:
            setting, why = self.became.get(id(found), ("", ""))
            if not setting and not why:
                why = self._reason(inside.get(id(found), name), found, id(found) in parts)
            lines.setdefault(id(found), Line(found.place, name, _shown(found), setting, why))
        passed = [Line(place, text, "", "", why) for place, text, why in self.values.passed_over]
        return sorted([*lines.values(), *passed], key=_order)

    def _reason(self, name: str, found: Found, is_part: bool) -> str:
        if isinstance(found.value, Unread):
            return f"not read: {found.value.why}"
        usual = PART if is_part else UNKNOWN
        return next((why for pattern, why in self.left_out.items() if fnmatchcase(name, pattern)), usual)


def _shown(found: Found) -> str:
    text = repr(found.value) if isinstance(found.value, str) else _told(found.plain)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _told(plain: Any) -> str:
    return f"[{', '.join(map(_told, plain))}]" if isinstance(plain, list) else str(plain)


def _order(line: Line) -> tuple[str, int]:
    file, _, number = line.place.rpartition(":")
    return file, int(number)
