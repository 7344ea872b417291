"""The memory that this process has used, and that it could still use."""

from __future__ import annotations

import resource
import sys
from typing import Any

import psutil
import torch

UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak_memory_bytes(device: Any) -> int:
    """Of the GPU that ``device`` is, or of the process in main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_BYTES


def free_memory_bytes(device: Any) -> int:
    """Of the GPU that ``device`` is, with what torch holds of it unused, or of main memory."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
