"""The value of an expression in a Python config, read from its syntax tree and never run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_LETTERS = 10_000  # of a text that is made by joining
MOST_POWER = 64
MOST_NUMBER = 10**30
SHOWN_LETTERS = 80  # of an expression that is not read

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
class Expressions:
    """Reads expressions of the file called ``file``.  ``values`` and ``symbols`` are what names stand for;
    ``parts`` are values that others were worked out from."""

    file: str
    values: dict[str, Found] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    parts: list[Found] = field(default_factory=list)

    def place(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 1)}"

    def read(self, node: ast.expr) -> Found:
        reader = READERS.get(type(node))
        return self.unread(node, "it would have to be run") if reader is None else reader(self, node)

    def unread(self, node: ast.AST, why: str) -> Found:
        return Found(Unread(ast.unparse(node)[:SHOWN_LETTERS], why), self.place(node))

    def constant(self, node: ast.Constant) -> Found:
        return Found(node.value, self.place(node))

    def name(self, node: ast.Name) -> Found:
        return self.values[node.id] if node.id in self.values else self.attribute(node)

    def attribute(self, node: ast.expr) -> Found:
        first, _, rest = ast.unparse(node).partition(".")
        if first not in self.symbols:
            return self.unread(node, "the name is not defined here")
        return Found(Symbol(self.symbols[first] + (f".{rest}" if rest else "")), self.place(node))

    def items(self, node: ast.List | ast.Tuple) -> Found:
        return Found([self.read(item) for item in node.elts], self.place(node))

    def mapping(self, node: ast.Dict) -> Found:
        return self._dict(list(zip(node.keys, node.values, strict=True)), node)

    def call(self, node: ast.Call) -> Found:
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict") or node.args:
            return self.unread(node, "it would have to be run")
        return self._dict([(w.arg and ast.Constant(w.arg), w.value) for w in node.keywords], node)

    def _dict(self, pairs: list[Any], node: ast.expr) -> Found:
        values: dict[str, Found] = {}
        for key, value in pairs:
            found = self.read(value)
            if key is None and isinstance(found.value, dict):  # **other
                values |= found.value
            else:
                values["**" if key is None else str(self.read(key).value)] = found
        return Found(values, self.place(node))

    def joined(self, node: ast.JoinedStr) -> Found:
        texts = []
        for part in node.values:
            inner, is_plain = part, True
            if isinstance(part, ast.FormattedValue):
                inner, is_plain = part.value, part.conversion == -1 and part.format_spec is None
            found = self.read(inner)
            if not (is_plain and _is_constant(found.value)):
                return self.unread(node, "a part of it is no constant")
            texts.append(str(found.value))
            self.parts.append(found)
        return Found("".join(texts), self.place(node))

    def binary(self, node: ast.BinOp) -> Found:
        return self.combined(node, node.op, self.read(node.left), self.read(node.right))

    def unary(self, node: ast.UnaryOp) -> Found:
        return self._computed(node, node.op, [self.read(node.operand)])

    def combined(self, node: ast.AST, op: ast.operator, left: Found, right: Found) -> Found:
        if isinstance(op, ast.Add) and isinstance(left.value, list) and isinstance(right.value, list):
            return Found([*left.value, *right.value], self.place(node))
        return self._computed(node, op, [left, right])

    def _computed(self, node: ast.AST, op: ast.AST, parts: list[Found]) -> Found:
        values = [part.value for part in parts]
        if type(op) not in OPERATIONS or not all(map(_is_constant, values)):
            return self.unread(node, "a part of it is no constant")
        if _would_be_enormous(op, values):
            return self.unread(node, "the result would be enormous")
        try:
            made = OPERATIONS[type(op)](*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            return self.unread(node, str(error))
        if isinstance(made, int) and abs(made) > MOST_NUMBER:
            return self.unread(node, "the result would be enormous")
        self.parts += parts
        return Found(made, self.place(node))


READERS: Mapping[type[ast.expr], Callable[[Expressions, Any], Found]] = {
    ast.Constant: Expressions.constant,
    ast.Name: Expressions.name,
    ast.Attribute: Expressions.attribute,
    ast.List: Expressions.items,
    ast.Tuple: Expressions.items,
    ast.Dict: Expressions.mapping,
    ast.Call: Expressions.call,
    ast.JoinedStr: Expressions.joined,
    ast.BinOp: Expressions.binary,
    ast.UnaryOp: Expressions.unary,
}


def _is_constant(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _would_be_enormous(op: ast.AST, values: list[Any]) -> bool:
    """Whether texts grow without bound, or powers do.  A text on the left of % is a format with a width."""
    if any(isinstance(value, str) for value in values):
        return not isinstance(op, ast.Add) or sum(len(str(value)) for value in values) > MOST_LETTERS
    return isinstance(op, ast.Pow) and max(abs(value or 0) for value in values) > MOST_POWER
