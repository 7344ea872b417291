"""Where the C library puts large tensors."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

OWN_MAP_BYTES = 1 << 20
USUAL_MAP_BYTES = 32 << 20  # where glibc's own adjustment ends; it trims the heap at twice as much
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_now = {"apart": False}


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """``keep_large_blocks_apart`` for what is made here only."""
    keep_large_blocks_apart(True)
    try:
        yield
    finally:
        keep_large_blocks_apart(False)


def give_back_freed() -> None:
    """Let other programs have the memory that was freed among small things that stay, where large blocks are
    kept apart (malloc_trim(3))."""
    if _now["apart"]:
        ctypes.CDLL(None).malloc_trim(0)


def keep_large_blocks_apart(apart: bool) -> None:
    """Give every block of ``OWN_MAP_BYTES`` or more that this process makes from now on pages of its own,
    which go with it, or else those that glibc gives after a while.

    By itself glibc raises that limit to 32 MB as large blocks are freed (mallopt(3)).  Weights, activations
    and what is computed on the way to them then share the heap with small things that stay, and the holes
    between them are kept: gigabytes on a base of 8B.  Mapping pages anew takes time.  Does nothing with
    another C library, or where the environment sets the limit."""
    asked = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if asked or platform.libc_ver()[0] != "glibc":
        return
    limit = OWN_MAP_BYTES if apart else USUAL_MAP_BYTES
    _now["apart"] = apart
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, limit)
    mallopt(M_TRIM_THRESHOLD, 2 * limit)
