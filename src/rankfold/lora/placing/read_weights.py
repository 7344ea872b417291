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
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(ancestor)))
        except (OSError, TypeError, SyntaxError):
            continue
        found.update(_reads(tree))
    return frozenset(found)


def _reads(tree: ast.AST) -> Iterator[str]:
    about = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ABOUT_A_TENSOR
    }
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name in NOT_IN_A_FORWARD:
            continue
        checked = {
            id(argument)
            for node in ast.walk(method)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            for argument in node.args
        }
        for node in ast.walk(method):
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
