"""How many compiled products are kept for products of the same widths to come."""

from __future__ import annotations

import os

# oneDNN's own, and that of the layer between it and torch.  Each keeps 1,024 by itself.
LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT = 128


def keep_few_programs() -> None:
    """Let oneDNN, which makes a program for every product in half precision of another width, keep ``KEPT``
    of them: rows differ in length, and a run would go on growing.

    Both limits are read at the first such product of the process; what the environment says stands."""
    for limit in LIMITS:
        os.environ.setdefault(limit, str(KEPT))
