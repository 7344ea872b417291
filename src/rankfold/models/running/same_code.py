"""Whether a method is, to the instruction, a known one: how a family's block is told from its look-alikes."""

from __future__ import annotations

from types import CodeType
from typing import Any


def same_code(function: Any, known: Any) -> bool:
    """Whether ``function`` runs the instructions of ``known`` with the same names and constants, whatever its
    docstring says.

    A function without Python code (built in, wrapped) is never the same."""
    if not all(isinstance(getattr(each, "__code__", None), CodeType) for each in (function, known)):
        return False
    return _content(function) == _content(known)


def _content(function: Any) -> tuple[bytes, tuple[str, ...], tuple[Any, ...]]:
    code = function.__code__
    return code.co_code, code.co_names, tuple(c for c in code.co_consts if c is not function.__doc__)
