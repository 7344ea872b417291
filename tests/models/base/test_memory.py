from __future__ import annotations

import mmap
import time

import psutil
import pytest

from rankfold.models.base import memory
from rankfold.models.base.memory import (
    container_bytes,
    free_memory_bytes,
    free_swap_bytes,
    peak_bytes_of,
    used_memory_bytes,
)

GB, MB = 10**9, 10**6


def group(folder, names, limit, used, kept) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {kept}\ntotal_inactive_file {kept}\n")


NAMES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_container_and_of_what_holds_it_count(tmp_path, version):
    root = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    group(root / "outer", NAMES[version], 8 * GB, 5 * GB, GB)
    group(root / "outer" / "inner", NAMES[version], 3 * GB if version == 1 else "max", 2 * GB, 0)
    told = tmp_path / "self"
    told.write_text("7:cpu:/other\n6:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    assert [*container_bytes(tmp_path / "cgroup", told)] == ([GB, 4 * GB] if version == 1 else [4 * GB])


def test_the_peak_of_a_block_is_seen_when_it_is_gone_again():
    before = used_memory_bytes("cpu")
    with peak_bytes_of("cpu") as peak:
        block = mmap.mmap(-1, 300 * MB)  # of the system: a heap might have as much that it has not given back
        block[:: 1 << 12] = b"1" * len(block[:: 1 << 12])
        time.sleep(0.05)
        block.close()
        time.sleep(0.05)
        assert used_memory_bytes("cpu") < before + 100 * MB
        assert before + 250 * MB < peak() < before + 700 * MB


def test_swap_counts_only_where_no_container_limits_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4 * GB}))
    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": GB}))
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([3 * GB]))
    assert free_swap_bytes("cpu") == 0
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([5 * GB]))
    assert (free_swap_bytes("cpu"), free_swap_bytes("cuda")) == (GB, 0)


def test_without_control_groups_the_machine_counts(tmp_path):
    assert [*container_bytes(tmp_path / "nowhere", tmp_path / "nothing")] == []


def test_free_memory_is_the_least_of_all_and_shared_among_the_processes_here(monkeypatch):
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([3 * GB, 2 * GB]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4 * GB}))
    assert free_memory_bytes("cpu") == 2 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory_bytes("cpu") == GB // 2
