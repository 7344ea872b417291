"""Where the C library puts large tensors."""

from __future__ import annotations

import ctypes
import os
import platform

OWN_MAP_BYTES = 4 << 20  # a quarter of it made training SmolLM2 slower, for pages that are mapped anew
TRIM_BYTES = 16 << 20  # of freed memory at the heap's end, before it goes back to the system
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_large_blocks_apart() -> None:
    """Let every block of ``OWN_MAP_BYTES`` or more have pages of its own, which go back when it is freed.

    By itself glibc raises that limit to 32 MB as large blocks are freed (mallopt(3)).  Weights and what is
    computed on the way to them then share the heap with small things that stay, and the holes between them
    are kept: gigabytes on a base of 8B.  Does nothing with another C library, or where the environment sets
    the limit."""
    asked = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if asked or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, OWN_MAP_BYTES)
    mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
