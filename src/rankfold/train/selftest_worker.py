"""What ``self_test`` starts in two processes: the gradient of one step, worked out by both."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from rankfold.data.order.batching import Padded
from rankfold.processes import Processes
from rankfold.train.selftest import gradients, random_rows, small_model
from rankfold.train.sharding import shard_base


def work(folder: Path) -> None:
    """Write to ``folder`` the gradients of a base that each process holds whole, and of one they share."""
    processes = Processes.join()
    for name in ("whole", "shared"):
        model = small_model()
        if name == "shared":
            shard_base(model, processes)
        found = gradients(model, random_rows(), Padded(), processes)
        if processes.is_first:
            save_file({f"{place:03}": gradient for place, gradient in enumerate(found)}, folder / name)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
