from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankfold.errors import OutputError
from rankfold.files import require_space, staged_folder, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    write_whole(path, "new: 笑")
    assert path.read_text(encoding="utf-8") == "new: 笑"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_whole(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = (
        "import sys\nfrom pathlib import Path\nfrom rankfold.files import write_whole\n"
        "write_whole(Path(sys.argv[1]), b'x' * 1_000_000)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    run = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OutputError: cannot write" in run.stderr
    assert "1,000,000 bytes" in run.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_whole(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_staged_folder_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "runs" / "one"
    with staged_folder(final) as folder:
        (folder / "a").write_text("x")
        assert not final.exists()
    assert (final / "a").read_text() == "x"
    assert [p.name for p in final.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_staged_folder_vanishes_on_an_error(tmp_path, error):
    final = tmp_path / "one"
    with pytest.raises(error), staged_folder(final) as folder:
        (folder / "a").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_staged_folder_never_replaces_a_full_one(tmp_path):
    final = tmp_path / "one"
    final.mkdir()
    (final / "precious").write_text("x")
    with pytest.raises(OutputError, match="cannot complete"), staged_folder(final) as folder:
        (folder / "a").write_text("y")
    assert [p.name for p in final.iterdir()] == ["precious"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match=r"not enough disk space at .* free, 1,000,000,000,000 MB needed"):
        require_space(tmp_path / "new" / "folder", 10**18)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        require_space(tmp_path / "file" / "run", 1)


def test_a_place_where_nobody_may_write_is_named():
    with pytest.raises(OutputError, match="cannot write at /proc: "):
        require_space(Path("/proc/run"), 0)


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    final, abandoned = tmp_path / "run", tmp_path / ".run.partial-1"
    abandoned.mkdir()
    (abandoned / "a").write_text("x")
    (tmp_path / ".running.partial-1").mkdir()
    with staged_folder(final) as mine:
        assert not abandoned.exists()
        program = (
            "import sys\nfrom pathlib import Path\nfrom rankfold.files import staged_folder\n"
            "with staged_folder(Path(sys.argv[1])): pass\n"
        )
        subprocess.run([sys.executable, "-c", program, str(final)], check=True)
        assert mine.exists()
        final.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".running.partial-1", "run"]
