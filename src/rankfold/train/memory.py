"""The most memory that this process has used."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak_memory_bytes(device: Any) -> int:
    """Of the GPU that ``device`` is, or of the process in main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_BYTES
