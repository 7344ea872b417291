"""The memory that this process has used, and that it could still use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
LOOK_S = 0.005
CGROUPS = Path("/sys/fs/cgroup")


def peak_memory_bytes(device: Any) -> int:
    """Of the GPU that ``device`` is, or of the process in main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_BYTES


def free_memory_bytes(device: Any) -> int:
    """Of the GPU that ``device`` is, with what torch holds of it unused, or of main memory: within the limits
    of this process's container, and its share where torchrun started several on this machine."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    return min([free, *container_bytes()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_swap_bytes(device: Any) -> int:
    """What main memory could put aside; none for a GPU, or where a container's limit is what counts."""
    free = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    limited = torch.device(device).type == "cuda" or min([free, *container_bytes()]) < free
    return 0 if limited else int(psutil.swap_memory().free)  # type: ignore[no-untyped-call]


def used_memory_bytes(device: Any) -> int:
    """What this process uses now of the GPU that ``device`` is, or of main memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)  # type: ignore[no-untyped-call]


@contextmanager
def peak_bytes_of(device: Any) -> Iterator[Callable[[], int]]:
    """What gives the most memory that this process has used on ``device`` since the block was entered: looked
    at every few milliseconds in main memory, where the system knows only the most ever."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield partial(torch.cuda.max_memory_allocated, device)
        return
    ever, ended, seen = peak_memory_bytes(device), Event(), [used_memory_bytes(device)]

    def look() -> None:
        while not ended.wait(LOOK_S):
            seen[0] = max(seen[0], used_memory_bytes(device))

    looking = Thread(target=look, daemon=True)
    looking.start()
    try:
        yield lambda: max(seen[0], peak if (peak := peak_memory_bytes(device)) > ever else 0)
    finally:
        ended.set()
        looking.join()


def container_bytes(cgroups: Path = CGROUPS, process: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is free under each limit of the control groups (versions 1 and 2) that this process is in; what
    the kernel keeps of files for the next time counts as free."""
    with suppress(OSError):
        for line in process.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root = cgroups if not controllers else cgroups / "memory"
            if controllers and "memory" not in controllers.split(","):
                continue
            inner = root / path.strip("/")
            for folder in (inner, *inner.parents):
                yield from _free_in(folder, version=1 if controllers else 2)
                if folder == root:
                    break


def _free_in(folder: Path, version: int) -> Iterator[int]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
        limit, used = (int((folder / name).read_text()) for name in names[:2])
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, limit - used + int(kept.get(names[2], 0)))
