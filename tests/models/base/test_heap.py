"""Where large tensors are put."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from conftest import tiny_llama
from rankfold.lora import LoraConfig
from rankfold.models.base import heap
from rankfold.models.base.load import load_base
from rankfold.peft_surface import get_peft_model
from rankfold.train.planning import recomputing

# Large blocks that go, each beside a small one that stays, as in loading; then how much is held in vain.
PROGRAM = """
import contextlib, sys, psutil, torch
from rankfold.models.base.heap import large_blocks_apart
def megabytes():
    return psutil.Process().memory_info().rss / 2**20
torch.ones(31 << 18); torch.ones(31 << 18)  # glibc has seen large blocks freed
before = megabytes()
with large_blocks_apart() if sys.argv[1] == "apart" else contextlib.nullcontext():
    passing, kept = zip(*[(torch.ones(5 << 18), torch.ones(1 << 15)) for _ in range(16)])
del passing
print(megabytes() - before - sum(t.nbytes for t in kept) / 2**20)
"""
# Blocks that are too small for pages of their own, freed among smaller ones that stay.
FREED = """
import sys, psutil
from rankfold.models.base.heap import give_back_freed, keep_large_blocks_apart
def megabytes():
    return psutil.Process().memory_info().rss / 2**20
keep_large_blocks_apart(sys.argv[1] == "apart")
before = megabytes()
passing, kept = zip(*[(bytearray(1 << 19), bytearray(1 << 12)) for _ in range(128)])
del passing
give_back_freed()
print(megabytes() - before)
"""
FEW = 4  # megabytes
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def held_in_vain(how: str, program: str = PROGRAM) -> float:
    command = [sys.executable, "-c", program, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@glibc_only
def test_the_pages_of_large_tensors_go_back_when_they_are_freed():
    assert held_in_vain("apart") < FEW < held_in_vain("as it is")


@glibc_only
def test_what_was_freed_among_small_things_goes_back_where_large_blocks_are_apart():
    assert held_in_vain("apart", FREED) < FEW < held_in_vain("as it is", FREED)


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


def test_a_base_is_loaded_with_large_blocks_apart(tiny_folder, monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr(heap, "keep_large_blocks_apart", kept.append)
    load_base(str(tiny_folder))
    assert kept == [True, False]


def test_large_blocks_stay_apart_where_activations_are_recomputed(monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr(recomputing, "keep_large_blocks_apart", kept.append)
    recomputing.recompute_activations(get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")))
    assert kept == [True]
