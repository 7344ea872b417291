"""The values in a Python config, read from its syntax tree: nothing in it is ever run.

Constants, names that stand for them, arithmetic, lists, tuples, dicts and calls of ``dict`` are values.
Whatever else stands there is kept as what it is, with its line, so that it can be told."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError
from rankfold.interop.python_expressions import Expressions, Found, Symbol, Unread

__all__ = ["Found", "PythonValues", "Symbol", "Unread", "leaves", "read_python"]

MOST_BYTES = 1 << 20
MOST_BASES = 8  # files that inherit from each other
BASE = "_base_"
DELETE = "_delete_"  # in a dict: take nothing from the one in the base


@dataclass
class PythonValues:
    """What a config assigns, by name, and the statements in it that were ``passed_over``, as (place, text,
    why).  ``parts`` are values that others were worked out from; they are here so that they can be told."""

    values: dict[str, Found] = field(default_factory=dict)
    passed_over: list[tuple[str, str, str]] = field(default_factory=list)
    parts: list[Found] = field(default_factory=list)


def read_python(path: Path) -> PythonValues:
    """Read the config at ``path`` and the files that its ``_base_`` names, if they are there.

    Raises ConfigError for a file that cannot be read or is not Python."""
    try:
        return _File(path, ()).read()
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be a config") from error


class _File:
    def __init__(self, path: Path, above: tuple[Path, ...]) -> None:
        self.path, self.above = path, (*above, path.resolve())
        self.found = PythonValues()
        self.expressions = Expressions(path.name, self.found.values, parts=self.found.parts)
        self.inherited: dict[str, Found] = {}  # from bases, and not assigned here yet

    def read(self) -> PythonValues:
        tree = _parsed(self.path)
        for node in tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [BASE]:
                named = self.expressions.read(node.value)
                for item in named.value if isinstance(named.value, list) else [named]:
                    self._base(node, item.value)
        self.inherited = dict(self.found.values)
        self._block(tree.body)
        return self.found

    def _base(self, node: ast.stmt, name: object) -> None:
        path = self.path.parent / str(name)
        if not isinstance(name, str) or not path.is_file():
            why = "no such file beside the config; its values are not known"
        elif path.resolve() in self.above or len(self.above) > MOST_BASES:
            why = "it leads back to itself"
        else:
            below = _File(path, self.above).read()
            self.found.values.update(_merged(self.found.values, below.values))
            self.found.passed_over += below.passed_over
            self.found.parts += below.parts
            return
        self.found.passed_over.append((self.expressions.place(node), f"{BASE} = {str(name)!r}", why))

    def _block(self, body: list[ast.stmt]) -> None:
        for node in body:
            reader = STATEMENTS.get(type(node))
            if reader is None:
                self.pass_over(node, "only assignments are read, and nothing is run")
            else:
                reader(self, node)

    def pass_over(self, node: ast.stmt, why: str) -> None:
        text = ast.unparse(node).splitlines()[0][:80]
        self.found.passed_over.append((self.expressions.place(node), text, why))

    def imports(self, node: ast.Import) -> None:
        self.expressions.symbols |= {a.asname or a.name.split(".")[0]: a.name for a in node.names}

    def imports_from(self, node: ast.ImportFrom) -> None:
        self.expressions.symbols |= {a.asname or a.name: f"{node.module or ''}.{a.name}" for a in node.names}

    def assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._give(node, target, node.value)

    def annotated(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._give(node, node.target, node.value)

    def _give(self, node: ast.stmt, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name):
            self.pass_over(node, "only plain names are assigned to")
        elif target.id != BASE:
            before = self.inherited.pop(target.id, None)
            self.found.values[target.id] = _inherited(before, self.expressions.read(value))

    def augmented(self, node: ast.AugAssign) -> None:
        if not isinstance(node.target, ast.Name):
            self.pass_over(node, "only plain names are assigned to")
            return
        before, more = self.expressions.name(node.target), self.expressions.read(node.value)
        self.found.values[node.target.id] = self.expressions.combined(node, node.op, before, more)

    def branch(self, node: ast.If) -> None:
        decided = self.expressions.read(node.test).value
        if isinstance(decided, Symbol | Unread | list | dict):
            self.pass_over(node, "whether this holds cannot be read")
        else:
            self._block(node.body if decided else node.orelse)

    def expression(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # which is a docstring
            self.pass_over(node, "only assignments are read, and nothing is run")


STATEMENTS: Mapping[type[ast.stmt], Callable[[_File, Any], None]] = {
    ast.Import: _File.imports,
    ast.ImportFrom: _File.imports_from,
    ast.Assign: _File.assign,
    ast.AnnAssign: _File.annotated,
    ast.AugAssign: _File.augmented,
    ast.If: _File.branch,
    ast.Expr: _File.expression,
    ast.Pass: lambda file, node: None,
}


def _merged(base: Mapping[str, Found], more: Mapping[str, Found]) -> dict[str, Found]:
    return {**base, **{name: _inherited(base.get(name), found) for name, found in more.items()}}


def _inherited(before: Found | None, found: Found) -> Found:
    """A dict adds to the one of the same name in a base, key by key, as in mmengine; other values replace."""
    if before is None or not (isinstance(before.value, dict) and isinstance(found.value, dict)):
        return found
    if DELETE in found.value:
        return Found({key: value for key, value in found.value.items() if key != DELETE}, found.place)
    return Found(_merged(before.value, found.value), found.place)


def leaves(found: Found, path: str) -> Iterator[tuple[str, Found]]:
    """Every value below ``found`` that is no list or dict of others, or an empty one, with its path."""
    inside: Iterator[tuple[object, Found]] = iter(())
    if isinstance(found.value, dict):
        inside = iter(found.value.items())
    elif isinstance(found.value, list) and any(isinstance(item.value, dict) for item in found.value):
        inside = enumerate(found.value)
    below = [leaf for key, item in inside for leaf in leaves(item, f"{path}.{key}")]
    yield from below or [(path, found)]


def _parsed(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is too large for a config: more than {MOST_BYTES:,} bytes")
        return ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1}: not Python: {error.msg}") from error
    except (ValueError, MemoryError) as error:
        raise ConfigError(f"{path} is not Python: {error}") from error
