"""Numba as a guest: where it writes, how many threads it takes, forks, and other threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import rankfold.kernels
from rankfold.kernels import forms, torch_forms
from rankfold.kernels.forms import form_of, name_of, use_numba

numba = pytest.importorskip("numba", reason="the extra named fast is not installed")

HALF = torch.bfloat16


def gated(rows=8, width=40):
    gate, up = (torch.linspace(-3, 3, rows * width).view(rows, width).to(HALF) for _ in range(2))
    return form_of(gate, up).gated(gate, up)


def test_it_computes_what_is_of_its_format_on_the_processor_and_torch_all_else(numba_cache):
    assert use_numba(HALF, numba_cache) == ""
    half, single = torch.zeros(2, 2, dtype=HALF), torch.zeros(2, 2)
    assert form_of(half, half).NAME == name_of(half.device, HALF) == f"numba {numba.__version__}"
    for others in ([single], [half, single], [half.to("meta")], [half.half()]):
        assert form_of(*others) is torch_forms
    assert use_numba(torch.float16, numba_cache) == "numba has no loops for torch.float16"


def run(program: str, cache: Path, **environment: str):
    start = (
        "import sys, torch\nfrom pathlib import Path\nfrom rankfold.kernels.forms import form_of, use_numba\n"
        "gate = torch.ones(64, 40).bfloat16()\nproblem = use_numba(torch.bfloat16, Path(sys.argv[1]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + program, str(cache)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def compiled(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc")]


@pytest.mark.slow
def test_compiled_loops_are_kept_where_it_is_told_and_nowhere_else(tmp_path):
    assert run("print(problem)", tmp_path / "cache").stdout == "\n"
    kept = {path: path.stat().st_mtime_ns for path in compiled(tmp_path / "cache")}
    assert kept
    assert compiled(Path(rankfold.kernels.__file__).parent) == []
    again = run("print(form_of(gate).gated(gate, gate)[0, 0].item())", tmp_path / "cache")
    assert float(again.stdout) == pytest.approx(0.731, abs=0.002)
    assert {path: path.stat().st_mtime_ns for path in compiled(tmp_path / "cache")} == kept


@pytest.mark.slow
def test_where_nothing_can_be_written_it_compiles_anew(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("print(repr(problem), form_of(gate).NAME)", tmp_path / "file" / "cache")
    assert done.stdout == f"'' numba {numba.__version__}\n", done.stderr
    assert compiled(Path(rankfold.kernels.__file__).parent) == []


@pytest.mark.slow
def test_a_layer_that_two_may_not_use_at_once_is_not_used(tmp_path):
    done = run("print(problem, '|', form_of(gate).NAME)", tmp_path, NUMBA_THREADING_LAYER="workqueue")
    assert done.stdout == "numba spreads loops by workqueue, which may not be used by two at once | torch\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_child_computes_by_torch_and_its_parent_goes_on(numba_cache):
    """In the child the threads are gone, and OpenMP would end it."""
    program = (
        "import os\nform_of(gate).gated(gate, gate)\nchild = os.fork()\n"
        "form = form_of(gate)\n"
        "sys.stdout.write(f'{form.NAME.split()[0]} {form.gated(gate, gate)[0, 0].item()}\\n')\n"
        "sys.stdout.flush()\n"
        "if child:\n    sys.stdout.write(f'{os.waitpid(child, 0)[1]}\\n')\n"
    )
    lines = sorted(run(program, numba_cache).stdout.split("\n"))
    assert lines == ["", "0", "numba 0.73046875", "torch 0.73046875"]


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_it_takes_as_many_threads_as_torch(numba_cache, threads):
    assert use_numba(HALF, numba_cache) == ""
    expected, before = gated(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(gated(), expected)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)


def test_torch_keeps_its_threads(numba_cache):
    program = "form_of(gate).gated(gate, gate)\nprint(torch.get_num_threads())"
    assert run(program, numba_cache, OMP_NUM_THREADS="1").stdout == "1\n"


def test_threads_may_compute_side_by_side(numba_cache):
    assert use_numba(HALF, numba_cache) == ""
    expected, found = gated(200, 300), []

    def compute():
        found.extend(gated(200, 300) for _ in range(20))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.equal(each, expected) for each in found)


def test_without_numba_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    assert use_numba(HALF, tmp_path) == "pip install 'rankfold[fast]' for one pass each"


def test_a_numba_that_cannot_be_imported_is_told(tmp_path):
    """As one is that does not know the numpy that is there."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    done = run("print(problem, '|', form_of(gate).NAME)", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout == "numba cannot be imported: Numba needs NumPy 2.3 or less | torch\n"


def test_a_full_disk_is_told_and_torch_computes(tmp_path, monkeypatch):
    from rankfold.kernels import numba_forms

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forms, "_table", {})
    monkeypatch.setattr(numba_forms, "_run", full)
    assert use_numba(HALF, tmp_path) == "numba cannot compute here: [Errno 28] No space left on device"
    assert form_of(torch.zeros(1, dtype=HALF)) is torch_forms


def test_every_loop_is_compiled_before_a_run_begins(numba_cache):
    """So that the time of a step is that of a step."""
    program = (
        "from rankfold.kernels import numba_forms as f, numba_loops as l\n"
        "print(sorted(n for n, v in vars(l).items() if hasattr(v, 'signatures') and not n.startswith('_')"
        " and len(v.signatures) != 1))"
    )
    assert run(program, numba_cache).stdout == "[]\n"
