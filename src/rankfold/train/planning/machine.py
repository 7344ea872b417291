"""The machine that a run is planned for: this one, measured, or another, as told."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from rankfold.models.base.memory import free_memory_bytes
from rankfold.models.base.precision import (
    Precision,
    choose_precision,
    default_device,
    product_speed,
)
from rankfold.models.choices import PrecisionName

SPEED_SHARE = 0.7  # of its products' speed that a whole step reaches: 0.74 on 2 cores (docs/benchmarks.md)
TERA, GB = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """``operations_per_s`` that a step reaches in each dtype, ``memory_bytes`` to fit into, and the
    ``precision`` that a base in few bytes is computed in; ``told`` says where each comes from."""

    precision: Precision
    operations_per_s: dict[torch.dtype, float]
    memory_bytes: float
    program_bytes: int
    told: list[str]


def planned_machine(
    precision: PrecisionName | None, tflops: float | None, memory_gb: float | None
) -> Machine:
    """``tflops`` and ``memory_gb`` describe another machine, and what is left out is measured on this one.

    Raises ConfigError for a ``precision`` that this machine cannot compute in, unless it is another's."""
    device = default_device()
    if tflops is not None:
        chosen = Precision.of(precision or "bfloat16")
    else:
        chosen = choose_precision(precision, device)
    dtypes = dict.fromkeys((torch.float32, torch.bfloat16, chosen.compute))
    if tflops is not None:
        speeds = dict.fromkeys(dtypes, tflops * TERA)
        speed_told = f"a step reaches {tflops:g} TFLOP/s, as given, whatever it computes in"
    else:
        products = {dtype: product_speed(device, dtype) for dtype in dtypes}
        speeds = {dtype: SPEED_SHARE * speed for dtype, speed in products.items()}
        measured = " and ".join(f"{v / TERA:.2f} TFLOP/s in {_name(d)}" for d, v in products.items())
        speed_told = f"a step reaches {SPEED_SHARE:g} of its products' speed, just measured here: {measured}"
    memory = free_memory_bytes(device) if memory_gb is None else memory_gb * GB
    own = psutil.Process().memory_info().rss  # type: ignore[no-untyped-call]
    where = "free here now" if memory_gb is None else "as given"
    return Machine(
        precision=chosen,
        operations_per_s=speeds,
        memory_bytes=memory + (own if memory_gb is None else 0),  # which a run would take instead
        program_bytes=own,
        told=[
            speed_told,
            f"{memory / GB:.1f} GB of memory, {where}; {own / GB:.1f} GB are the program itself",
        ],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
