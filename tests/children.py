"""Runs and commands in processes of their own, which may be killed at any point.

The processes are forked from a server that has imported everything and computed nothing, so that one
starts in milliseconds and no thread pool is copied half alive."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "rankfold.train.run",
        "rankfold.cli.main",
        "rankfold.models.answering.answers",
        "rankfold.kernels.numba_forms",
        "transformers.models.llama.modeling_llama",
        "transformers.generation",
    ]
)
KILLED = -signal.SIGKILL
PATIENCE_S = 300


def run_together(call: str, argument: Any, count: int) -> list[int]:
    """As ``run``, in ``count`` processes that meet as torchrun's do; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(count):
        environment = {**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(CONTEXT.Process(target=_work, args=(call, argument, 0, None, environment)))
        processes[-1].start()
    for process in processes:
        process.join()
    return [int(process.exitcode) for process in processes]


def start(call: str, argument: Any, kill_at: int = 0, count_to: Path | None = None) -> Any:
    """Start ``fine_tune(Recipe.of(argument))`` or ``resume(argument)`` in a child.

    The child kills itself at its ``kill_at``-th write, sync, rename or removal; ``count_to`` is a file
    for the number of those points that it passed."""
    process = CONTEXT.Process(target=_work, args=(call, argument, kill_at, count_to))
    process.start()
    return process


def run(call: str, argument: Any, kill_at: int = 0, count_to: Path | None = None) -> int:
    """As ``start``, and wait; the exit code."""
    process = start(call, argument, kill_at, count_to)
    process.join()
    return int(process.exitcode)


class Command:
    """``rankfold`` with ``arguments`` as a user starts it, but for the seconds of its imports."""

    def __init__(self, *arguments: object, input: str = "") -> None:
        self._folder = TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        for file, text in zip(self._files, (input, "", ""), strict=True):
            file.write_text(text, encoding="utf-8")
        given = ([*map(str, arguments)], os.getcwd(), dict(os.environ), [*map(str, self._files)])
        self._process = CONTEXT.Process(target=_command, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def printed(self) -> tuple[str, str]:
        """What is in standard output and in standard error by now."""
        out, err = (file.read_text(encoding="utf-8") for file in self._files[1:])
        return out, err

    def wait_for(self, text: str) -> None:
        """Until ``text`` has been printed."""
        while text not in self.printed()[0]:
            assert self.returncode is None, f"{text!r} never came: {self.printed()}"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def finish(self) -> subprocess.CompletedProcess[str]:
        self._process.join(PATIENCE_S)
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"it did not end: {self.printed()}")
        out, err = self.printed()
        self._folder.cleanup()
        return subprocess.CompletedProcess([], self.returncode, out, err)


def _command(arguments: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(files):
        file = os.open(name, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", encoding="utf-8") for n in range(3))  # noqa: SIM115
    sys.argv = ["rankfold", *arguments]
    from rankfold.cli.main import main

    main()


def _work(
    call: str,
    argument: Any,
    kill_at: int,
    count_to: Path | None,
    environment: Mapping[str, str] | None = None,
) -> None:
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    from rankfold.train.asked.recipe import Recipe
    from rankfold.train.run import fine_tune, resume

    points = _Points(kill_at)
    if call == "fine_tune":
        fine_tune(Recipe.of(argument))
    else:
        resume(argument)
    if count_to is not None:
        count_to.write_text(str(points.passed))


class _Points:
    """Counts the places where the file system changes, and kills the process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.passed = 0
        for owner, names in {
            os: ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"),
            pathlib.Path: ("write_bytes", "write_text"),
        }.items():
            for name in names:
                setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passed += 1
            if self.passed == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted
