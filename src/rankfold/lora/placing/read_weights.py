"""Linear layers whose weight is read from outside: ``self.dt_proj.weight @ x`` instead of
``self.dt_proj(x)``.

An update that only the layer's own forward adds would have no effect there, and one after merging.  Such a
layer shows its weight with the update in it.  Which layers these are is read off the source of the modules
around them; a read of the weight's dtype, device or shape is none."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType

from torch import nn

from rankfold.lora.layers.attention import LoraReadLinear
from rankfold.lora.layers.base import AdapterLayer

NOT_IN_A_FORWARD = ("__init__", "reset_parameters", "_init_weights", "_reset_parameters", "tie_weights")
ABOUT_A_TENSOR = ("data_ptr", "device", "dtype", "dim", "is_meta", "requires_grad", "shape", "size", "numel")


def shown_class(modules: Mapping[str, nn.Module], target: str) -> type[AdapterLayer] | None:
    """The class for a linear layer whose weight the modules around it read, or None for any other layer."""
    layer = modules[target]
    kind = layer.plain_class if isinstance(layer, AdapterLayer) else type(layer)
    if kind is not nn.Linear:
        return None
    parts = target.split(".")
    for start in range(len(parts)):
        owner = modules.get(".".join(parts[:start]))
        own = ".".join("*" if part.isdigit() else part for part in parts[start:])
        if owner is not None and own in weights_read_by(type(owner)):  # type: ignore[arg-type]
            return LoraReadLinear
    return None


@cache
def weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The dotted names below ``self`` whose ``weight`` some method of ``kind`` computes with, a number in
    them as ``*``; none where the source cannot be had."""
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()  # its own layers that do this are adapted in their own ways
    found: set[str] = set()
    for ancestor in kind.__mro__:
        if ancestor.__module__.partition(".")[0] == "torch" or not issubclass(ancestor, nn.Module):
            continue
        for name, member in vars(ancestor).items():
            method = inspect.unwrap(member) if callable(member) else None
            if name not in NOT_IN_A_FORWARD and _says_weight(getattr(method, "__code__", None)):
                try:
                    found.update(_reads(ast.parse(textwrap.dedent(inspect.getsource(method)))))  # type: ignore[arg-type]
                except (OSError, TypeError, SyntaxError):
                    continue
    return frozenset(found)


def _says_weight(code: object) -> bool:
    """Whether the name stands in a function or in one inside it: few do, and sources are slow to read."""
    if not isinstance(code, CodeType):
        return False
    return "weight" in code.co_names or any(_says_weight(inner) for inner in code.co_consts)


def _reads(tree: ast.AST) -> Iterator[str]:
    about = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ABOUT_A_TENSOR
    }
    checked = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for argument in node.args
    }
    for node in ast.walk(tree):
        is_weight = isinstance(node, ast.Attribute) and node.attr == "weight"
        computes = is_weight and id(node) not in about | checked and isinstance(node.ctx, ast.Load)  # type: ignore[attr-defined]
        if computes and (name := _below_self(node.value)) is not None:  # type: ignore[attr-defined]
            yield name


def _below_self(node: ast.expr) -> str | None:
    """``a.b.*`` for ``self.a.b[i]``; None for what does not begin at self."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            parts.append("*")
            node = node.value
        else:
            break
    begins = isinstance(node, ast.Name) and node.id == "self" and parts
    return ".".join(reversed(parts)) if begins else None
