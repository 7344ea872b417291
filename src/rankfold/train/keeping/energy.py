"""The energy that the processor takes, where its counters can be read (Intel's and AMD's RAPL on Linux)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")
MICRO = 1e-6


class Energy:
    """Joules of all processor packages since the last call.  Other programs' are among them."""

    def __init__(self, counters: Path = COUNTERS) -> None:
        packages = [path for path in sorted(counters.glob("*rapl:*")) if path.name.count(":") == 1]
        self.counters = {path: value for path in packages if (value := _read(path / "energy_uj")) is not None}

    def joules(self) -> float | None:
        """None where there is nothing to read."""
        if not self.counters:
            return None
        total = 0
        for path, before in self.counters.items():
            now = _read(path / "energy_uj")
            if now is None:
                return None
            wrapped = (_read(path / "max_energy_range_uj") or 0) if now < before else 0
            total += now - before + wrapped
            self.counters[path] = now
        return total * MICRO


def _read(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None
