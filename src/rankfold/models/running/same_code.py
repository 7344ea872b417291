"""Whether a method is, to the instruction, a known one: how a family's block is told from its look-alikes."""

from __future__ import annotations

from types import CodeType
from typing import Any


def same_code(function: Any, known: Any) -> bool:
    """Whether ``function`` runs the instructions of ``known`` with the same names and constants.

    A function without Python code (built in, wrapped) is never the same."""
    mine, wanted = (getattr(each, "__code__", None) for each in (function, known))
    if not isinstance(mine, CodeType) or not isinstance(wanted, CodeType):
        return False
    return _content(mine) == _content(wanted)


def _content(code: CodeType) -> tuple[bytes, tuple[str, ...], tuple[Any, ...]]:
    return code.co_code, code.co_names, code.co_consts
