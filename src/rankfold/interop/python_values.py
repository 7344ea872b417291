"""The values in a Python config, read from its syntax tree: nothing in it is ever run.

Constants, names that stand for them, arithmetic, lists, tuples, dicts and calls of ``dict`` are values.
Whatever else stands there is kept as what it is, with its line, so that it can be told."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError

MOST_BYTES = 1 << 20
MOST_LETTERS = 10_000  # of a text that is made by joining or repeating
MOST_POWER = 64
MOST_NUMBER = 10**30
MOST_BASES = 8  # files that inherit from each other

OPERATIONS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


@dataclass(frozen=True, eq=False)
class Found:
    """A value and where it stands (``config.py:12``): a constant, a list of Found, a dict of them by key,
    a Symbol or Unread.  The same constant under two names is the same object."""

    value: Any
    place: str

    @property
    def plain(self) -> Any:
        """The value with lists and dicts of plain values; Symbol and Unread as they are."""
        if isinstance(self.value, list):
            return [item.plain for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain for key, item in self.value.items()}
        return self.value


@dataclass(frozen=True)
class Symbol:
    """Something that the config imports, or a part of it, by its dotted name."""

    name: str

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Unread:
    """An expression that is not a value, and why it was not read."""

    text: str
    why: str

    def __str__(self) -> str:
        return self.text


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
        return _Reader(path, ()).read()
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be a config") from error


class _Reader:
    def __init__(self, path: Path, above: tuple[Path, ...]) -> None:
        self.path, self.above = path, (*above, path.resolve())
        self.found = PythonValues()
        self.symbols: dict[str, str] = {}
        self.inherited: dict[str, Found] = {}  # from bases, and not assigned here yet

    def read(self) -> PythonValues:
        tree = _parsed(self.path)
        self._bases(tree)
        self.inherited = dict(self.found.values)
        for statement in tree.body:
            self._statement(statement)
        return self.found

    def _place(self, node: ast.AST) -> str:
        return f"{self.path.name}:{getattr(node, 'lineno', 1)}"

    def _bases(self, tree: ast.Module) -> None:
        for node in tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["_base_"]:
                named = self._value(node.value)
                for item in named.value if isinstance(named.value, list) else [named]:
                    self._base(node, item.value)

    def _base(self, node: ast.AST, name: object) -> None:
        path = self.path.parent / str(name)
        if not isinstance(name, str) or not path.is_file():
            why = "no such file beside the config; its values are not known"
        elif path.resolve() in self.above or len(self.above) > MOST_BASES:
            why = "it leads back to itself"
        else:
            below = _Reader(path, self.above).read()
            self.found.values = _merged(self.found.values, below.values)
            self.found.passed_over += below.passed_over
            self.found.parts += below.parts
            return
        self.found.passed_over.append((self._place(node), f"_base_ = {str(name)!r}", why))

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import(names=names):
                self.symbols |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names):
                self.symbols |= {a.asname or a.name: f"{module or ''}.{a.name}" for a in names}
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(node, target, self._value(value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(node, target, self._value(value))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                before = self.found.values.get(name, Found(Unread(name, "it has no value yet"), self._place(node)))
                self.found.values[name] = self._combined(node, op, before, self._value(value))
            case ast.If(test=test, body=body, orelse=orelse):
                self._branch(node, test, body, orelse)
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass  # a docstring
            case _:
                self._pass_over(node, "only assignments are read, and nothing is run")

    def _assign(self, node: ast.stmt, target: ast.expr, found: Found) -> None:
        if isinstance(target, ast.Name):
            before = self.inherited.pop(target.id, None)
            if target.id != "_base_":
                self.found.values[target.id] = _inherited(before, found)
        else:
            self._pass_over(node, "only plain names are assigned to")

    def _branch(self, node: ast.If, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        decided = self._value(test).value
        if isinstance(decided, Symbol | Unread | list | dict):
            self._pass_over(node, "whether this holds cannot be read")
            return
        for statement in body if decided else orelse:
            self._statement(statement)

    def _pass_over(self, node: ast.stmt, why: str) -> None:
        self.found.passed_over.append((self._place(node), ast.unparse(node).splitlines()[0][:80], why))

    def _value(self, node: ast.expr) -> Found:
        place = self._place(node)
        match node:
            case ast.Constant(value=value):
                return Found(value, place)
            case ast.Name(id=name) if name in self.found.values:
                return self.found.values[name]
            case ast.Name() | ast.Attribute():
                return self._named(node, place)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return Found([self._value(item) for item in items], place)
            case ast.Dict(keys=keys, values=values):
                return self._dict([(key, value) for key, value in zip(keys, values, strict=True)], node)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words):
                return self._dict([(w.arg and ast.Constant(w.arg), w.value) for w in words], node)
            case ast.JoinedStr(values=parts):
                return self._joined(parts, node)
            case ast.BinOp(left=left, op=op, right=right):
                return self._combined(node, op, self._value(left), self._value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATIONS:
                return self._computed(node, op, [self._value(operand)])
        return Found(Unread(ast.unparse(node)[:80], "it would have to be run"), place)

    def _named(self, node: ast.expr, place: str) -> Found:
        first, _, rest = ast.unparse(node).partition(".")
        if first in self.symbols:
            return Found(Symbol(self.symbols[first] + (f".{rest}" if rest else "")), place)
        return Found(Unread(ast.unparse(node)[:80], "the name is not defined here"), place)

    def _dict(self, pairs: list[tuple[Any, ast.expr]], node: ast.expr) -> Found:
        values: dict[str, Found] = {}
        for key, value in pairs:
            found = self._value(value)
            if key is None and isinstance(found.value, dict):  # **other
                values |= found.value
                continue
            name = self._value(key).value if key is not None else "**"
            values[str(name)] = found
        return Found(values, self._place(node))

    def _joined(self, parts: list[ast.expr], node: ast.expr) -> Found:
        texts = []
        for part in parts:
            plain = isinstance(part, ast.FormattedValue) and part.conversion == -1 and part.format_spec is None
            found = self._value(part.value) if isinstance(part, ast.FormattedValue) else self._value(part)
            if not (plain or isinstance(part, ast.Constant)) or not _is_constant(found.value):
                return Found(Unread(ast.unparse(node)[:80], "a part of it is no constant"), self._place(node))
            texts.append(str(found.value))
            self.found.parts.append(found)
        return Found("".join(texts), self._place(node))

    def _combined(self, node: ast.AST, op: ast.operator, left: Found, right: Found) -> Found:
        if isinstance(op, ast.Add) and isinstance(left.value, list) and isinstance(right.value, list):
            return Found([*left.value, *right.value], self._place(node))
        return self._computed(node, op, [left, right])

    def _computed(self, node: ast.AST, op: ast.AST, parts: list[Found]) -> Found:
        place, text = self._place(node), ast.unparse(node)[:80]
        values = [part.value for part in parts]
        if type(op) not in OPERATIONS or not all(map(_is_constant, values)):
            return Found(Unread(text, "a part of it is no constant"), place)
        if _is_enormous(op, values):
            return Found(Unread(text, "the result would be enormous"), place)
        try:
            made = OPERATIONS[type(op)](*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            return Found(Unread(text, str(error)), place)
        if isinstance(made, int) and abs(made) > MOST_NUMBER:
            return Found(Unread(text, "the result would be enormous"), place)
        self.found.parts += parts
        return Found(made, place)


def _is_constant(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_enormous(op: ast.AST, values: list[Any]) -> bool:
    """Whether texts grow without bound, or powers do.  A text on the left of % is a format with a width."""
    if any(isinstance(value, str) for value in values):
        joined = isinstance(op, ast.Add) and sum(len(str(value)) for value in values) <= MOST_LETTERS
        return not joined
    return isinstance(op, ast.Pow) and max(abs(value or 0) for value in values) > MOST_POWER


def _merged(base: Mapping[str, Found], more: Mapping[str, Found]) -> dict[str, Found]:
    return {**base, **{name: _inherited(base.get(name), found) for name, found in more.items()}}


def _inherited(before: Found | None, found: Found) -> Found:
    """A dict adds to the one of the same name in a base, key by key, as in mmengine; other values replace."""
    if before is None or not (isinstance(before.value, dict) and isinstance(found.value, dict)):
        return found
    own = {key: value for key, value in found.value.items() if key != "_delete_"}
    if "_delete_" in found.value:
        return Found(own, found.place)
    return Found(_merged(before.value, own), found.place)


def leaves(found: Found, path: str) -> Iterator[tuple[str, Found]]:
    """Every value below ``found`` that is no list or dict of others, with its dotted path; an empty one too."""
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
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} is not Python: {error}") from error
