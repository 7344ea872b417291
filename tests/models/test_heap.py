"""Where large tensors are put."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from rankfold.models import heap

# Large blocks that go, each beside a small one that stays, as in loading; then how much is held in vain.
PROGRAM = """
import contextlib, sys, psutil, torch
from rankfold.models.heap import large_blocks_apart
def megabytes():
    return psutil.Process().memory_info().rss / 2**20
torch.ones(31 << 18); torch.ones(31 << 18)  # glibc has seen large blocks freed
before = megabytes()
with large_blocks_apart() if sys.argv[1] == "apart" else contextlib.nullcontext():
    passing, kept = zip(*[(torch.ones(5 << 18), torch.ones(1 << 15)) for _ in range(16)])
del passing
print(megabytes() - before - sum(t.nbytes for t in kept) / 2**20)
"""
FEW = 4  # megabytes
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def held_in_vain(how: str) -> float:
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@glibc_only
def test_the_pages_of_large_tensors_go_back_when_they_are_freed():
    assert held_in_vain("apart") < FEW < held_in_vain("as it is")


@pytest.mark.parametrize(
    "asked",
    [{"MALLOC_MMAP_THRESHOLD_": "33554432"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}],
)
def test_a_limit_that_the_user_set_stays(monkeypatch, asked):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("the limit was set anew"))
    with heap.large_blocks_apart():
        pass
