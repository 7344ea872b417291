"""The number format that a frozen base is held and computed in, chosen by timing products on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import ConfigError, ModelError, bullet_list
from rankfold.models.base.programs import keep_few_programs
from rankfold.models.choices import PrecisionName

CLEARLY_FASTER = 1.5  # a step is more than products: 2 to 3 times faster ones made a step 1.6 times faster
PROBE_S = 0.05
LEAST_ROUNDS = 5
CPU_PRODUCT = (128, 1024, 1024)  # tokens, features in and out
GPU_PRODUCT = (2048, 2048, 2048)  # a smaller one would time the launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """``storage``: what the base's weights are held in; ``compute``: what products are computed in.
    Adapters are float32 whatever these are.

    ``reason`` is why, and ``cost`` what a user who asked for it should know, or an empty string."""

    name: PrecisionName
    storage: torch.dtype
    compute: torch.dtype
    reason: str
    cost: str = ""

    @classmethod
    def of(cls, name: PrecisionName, reason: str = "as given", cost: str = "") -> Precision:
        dtype: torch.dtype = getattr(torch, name)
        return cls(name=name, storage=dtype, compute=dtype, reason=reason, cost=cost)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """What a forward runs in; nothing changes for float32.  Enter it anew for each forward: casts of
        trained weights are kept until it ends."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def default_device() -> torch.device:
    """Where models are put: a CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(given: PrecisionName | None, device: torch.device) -> Precision:
    """``given``, or what a probe of ``device`` decides (see ``decide``).

    Raises ConfigError if the device cannot compute in ``given``."""
    if given == "float32":
        return Precision.of(given)
    if given is None:
        return decide(measure_speeds(device, _worth_trying(device)), device)
    speeds = measure_speeds(device, [given])
    if given not in speeds:
        raise ConfigError(f"precision: {_place(device)} cannot compute in {given}; choose float32")
    slower = speeds[given] < 1
    cost = f"{given} as given, at a price: {_compared(speeds)} on {_place(device)}" if slower else ""
    return Precision.of(given, cost=cost)


def decide(speeds: dict[PrecisionName, float], device: torch.device) -> Precision:
    """bfloat16 if its products are clearly faster than float32's, else float16 if its are, else float32.

    ``speeds``: how many times as fast as float32 each one is; what the device cannot do is left out."""
    candidates: tuple[PrecisionName, ...] = ("bfloat16", "float16")
    clear = (name for name in candidates if speeds.get(name, 0.0) >= CLEARLY_FASTER)
    if not speeds:
        return Precision.of("float32", f"{_place(device)} computes in nothing narrower")
    return Precision.of(next(clear, "float32"), f"{_compared(speeds)} on {_place(device)}")


def hold_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with its parameters in ``dtype``.  Buffers stay: the angles of positions lose too much."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def held_notes(model: nn.Module, written: torch.dtype, held: torch.dtype) -> list[str]:
    """What it takes to hold weights that were ``written`` in one type in another; raises ModelError if
    one of them is too large for it."""
    if held == written:
        return []
    parameters = dict(model.named_parameters())
    if held == torch.float16 and (
        large := [name for name, weight in parameters.items() if not weight.isfinite().all()]
    ):
        headline = "these weights are too large for float16; take bfloat16 or float32:"
        raise ModelError(bullet_list(headline, large))
    count = sum(weight.numel() for weight in parameters.values())
    size, before = (f"{count * dtype.itemsize / 1e6:,.0f} MB" for dtype in (held, written))
    verb = "held as" if held.itemsize > written.itemsize else "rounded to"
    instead = "" if size == before else f" instead of {before}"
    return [f"the weights come as {_name(written)} and are {verb} {_name(held)}: {size}{instead}"]


def measure_speeds(device: torch.device, names: Collection[PrecisionName]) -> dict[PrecisionName, float]:
    """How many times as fast as in float32 a linear layer's product is in each of ``names``, by the clock.

    Float32 and the others take turns, and the median over the rounds of their ratio is given, so that
    another program on the machine slows both or is left out.  Leaves the random state alone."""
    rows, width, out = CPU_PRODUCT if device.type == "cpu" else GPU_PRODUCT
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, width, generator=generator).to(device)
    weight = torch.rand(out, width, generator=generator).to(device)
    pairs: dict[PrecisionName, tuple[Tensor, Tensor]] = {"float32": (x, weight)}
    for name in names:
        try:
            pair = x.to(getattr(torch, name)), weight.to(getattr(torch, name))
            _seconds(*pair)
        except (RuntimeError, TypeError):  # how a device says that it has no such numbers
            continue
        pairs[name] = pair
    _seconds(x, weight)
    rounds: list[dict[PrecisionName, float]] = []
    until = time.perf_counter() + PROBE_S
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < until:
        rounds.append({name: _seconds(*pair) for name, pair in pairs.items()})
    return {
        name: statistics.median(times["float32"] / times[name] for times in rounds)
        for name in pairs
        if name != "float32"
    }


def product_speed(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None
) -> float:
    """The multiplications and additions a second of a linear layer's product in ``dtype``, of ``shape``
    (tokens, features in and out): the fastest of a twentieth of a second, since other programs on the machine
    only make it slower."""
    rows, width, out = shape or (CPU_PRODUCT if device.type == "cpu" else GPU_PRODUCT)
    x = torch.ones(rows, width, device=device, dtype=dtype)
    weight = torch.ones(out, width, device=device, dtype=dtype)
    _seconds(x, weight)
    times: list[float] = []
    until = time.perf_counter() + PROBE_S
    while len(times) < LEAST_ROUNDS or time.perf_counter() < until:
        times.append(_seconds(x, weight))
    return 2 * rows * width * out / min(times)


@torch.no_grad()
def _seconds(x: Tensor, weight: Tensor) -> float:
    """The time that x W^T takes; x (rows, in), weight (out, in)."""
    keep_few_programs()
    _wait_for(x.device)
    started = time.perf_counter()
    F.linear(x, weight)
    _wait_for(x.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _worth_trying(device: torch.device) -> list[PrecisionName]:
    """On a CPU float16 is for who asks for it: products were 3.7 times slower than in float32 on one that is
    fast in bfloat16."""
    return ["bfloat16"] if device.type == "cpu" else ["bfloat16", "float16"]


def _compared(speeds: dict[PrecisionName, float]) -> str:
    parts = [
        f"{name} products run {speed:.1f}x faster"
        if speed >= 1
        else f"{name} products run {1 / speed:.1f}x slower"
        for name, speed in speeds.items()
    ]
    return f"{' and '.join(parts)} than float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(device: torch.device) -> str:
    return "this processor" if device.type == "cpu" else f"this {device.type.upper()} device"
