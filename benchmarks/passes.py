"""What lies between the matrix products of a step in bfloat16: passes by Numba against torch's operations.

    python benchmarks/passes.py gsm8k_test.jsonl

SmolLM2 with a rank 8 adapter on all linear layers goes forward and backward through one micro-batch of
rows, and every matrix product takes no time: it gives memory as it is.  So the figure can be measured on a
processor that has no units for bfloat16, where the products would hide everything else.  What is computed
means nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from parts.figures import Figure, parser, record
from parts.trials import encoded, longest, packed, trial
from torch import Tensor
from torch.nn import functional as F

from rankfold.kernels import forms
from rankfold.models.base.precision import Precision

TIMES = 2  # 1,024 tokens


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=8)
    options = made.parse_args()
    side = trial(options, encoded(options), "all", Precision.of("bfloat16"))
    rows = longest(side, packed(TIMES))
    by_numba = dict(forms._table)
    if not by_numba:
        return record([Figure(name="passes_bfloat16", what="", unit="", failed="numba is not installed")])
    taken: dict[str, list[float]] = {"numba": [], "torch": []}
    with free_products():
        for _ in range(options.rounds + 1):  # of which the first warms up
            for name, table in {"numba": by_numba, "torch": {}}.items():
                with patch.dict(forms._table, table, clear=True):
                    taken[name].append(side.seconds(rows, packed(TIMES))[1])
    ours, theirs = (times[1:] for times in taken.values())
    record(
        [
            Figure(
                name="passes_bfloat16",
                what="between the products of forward and backward in bfloat16, by Numba to torch's "
                "operations",
                unit="s",
                ratios=[a / b for a, b in zip(ours, theirs, strict=True)],
                ours=statistics.median(ours),
                theirs=statistics.median(theirs),
            )
        ]
    )


@contextmanager
def free_products() -> Iterator[None]:
    def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)

    with (
        patch.object(torch, "mm", lambda a, b: a.new_empty(len(a), b.shape[1])),
        patch.object(torch, "bmm", lambda a, b: a.new_empty(*a.shape[:2], b.shape[2])),
        patch.object(F, "linear", linear),
        patch.object(Tensor, "addmm_", lambda sum_, *_, **__: sum_),
    ):
        yield


if __name__ == "__main__":
    main()
