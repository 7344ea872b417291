"""Using transformers without its progress bars and advice."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice from transformers inside the block; errors still raise.

    Standard error is set aside because the GGUF reader's bar obeys no switch."""
    # transformers imports torchao where it is installed, and torch has something to say about that.
    pytree = logging.getLogger("torch.utils._pytree")
    pytree_level = pytree.level
    pytree.setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        pytree.setLevel(pytree_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
