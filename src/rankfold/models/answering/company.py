"""The adapters whose rows are answered side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rankfold.lora.layers.mixed import MixedRows
from rankfold.peft_surface.mixed_batch import BASE, mixed_batches, why_apart

SPARE = 4  # adapters that may be ready although nobody asks them, beside as many as are asked


class Company:
    """Lets a model compute each row of a batch by the adapter it is asked for.

    The factors of those that are asked together are laid one above the other once, and that is kept as long
    as no other is asked and most of them are."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._ready = ExitStack()
        self._rows: MixedRows | None = None
        self._alone: str | None = None
        self._sides: dict[str | None, str | None] = {None: None, BASE: BASE}

    def side(self, name: str | None) -> str | None:
        """Rows whose adapters are of one side can be in one batch."""
        if name not in self._sides:
            self._sides[name] = name if why_apart(self.model, str(name)) else BASE
        return self._sides[name]

    def call(self, names: Sequence[str | None]) -> None:
        """From now on row i of a batch is computed by the adapter ``names[i]``; all are of one side."""
        if self.side(names[0]) != BASE:
            if names[0] != self._alone or self._rows is not None:
                self.leave()
                self._alone = names[0]
                if self._alone is not None:
                    self._ready.enter_context(_active(self.model, self._alone))
            return
        asked = {name for name in names if name is not None and name != BASE}
        known = set() if self._rows is None else {*self._rows.carried}
        both, most = asked | known, 2 * len(asked) + SPARE
        if self._rows is None or both != known or len(known) > most:
            self.leave()
            carried = sorted(both if len(both) <= most else asked)
            self._rows = self._ready.enter_context(mixed_batches(self.model, carried))
        self._rows.names = [None if name == BASE else name for name in names]

    def forget(self, name: str) -> None:
        """The adapter ``name`` is no more."""
        self._sides.pop(name, None)

    def leave(self) -> None:
        """Let the model be as it was before; an adapter may be added or deleted then."""
        self._ready.close()
        self._rows, self._alone = None, None


@contextmanager
def _active(model: Any, name: str) -> Iterator[None]:
    before = list(model.active_adapters)
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(before, inference_mode=True)
