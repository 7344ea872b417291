"""Two adapters made into one by ``svd``, beside PEFT: the time, and how far each is from dense float64.

python benchmarks/combining.py"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import peft
import torch
from parts.figures import Figure, record
from torch import Tensor, nn

import rankfold

SIZE, RANK, ROUNDS = 2048, 16, 3
WEIGHTS = [0.7, 0.4]


def main() -> None:
    warnings.simplefilter("ignore")
    models = [adapted(library) for library in (rankfold, peft)]
    nearest = dense(models[0])
    times, errors = [], []
    for place in range(ROUNDS):
        found = [combined(model, f"both{place}") for model in models]
        times.append([seconds for seconds, _ in found])
        errors.append([float((delta - nearest).norm() / nearest.norm()) for _, delta in found])
    what = f"two adapters of rank {RANK} on a layer of {SIZE} x {SIZE} combined by svd"
    linear = [error_of_linear(model) for model in models]
    record(
        [
            figure("combine_svd", f"{what}, to PEFT's time", "s", times, at_most=0.01),
            figure(
                "combine_svd_error", f"{what}: the error beside dense float64, to PEFT's", "relative", errors
            ),
            figure(
                "combine_linear_error",
                "the same adapters by linear: how far that is from the weighted sum in float64, to PEFT's",
                "relative",
                [linear],
            ),
        ]
    )


def figure(name: str, what: str, unit: str, pairs: list[list[float]], at_most: float | None = None) -> Figure:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [own / other for own, other in pairs]
    return Figure(name=name, what=what, unit=unit, ratios=ratios, ours=ours, theirs=theirs, at_most=at_most)


def adapted(library: Any) -> Any:
    """The same two adapters with random factors in either library."""
    config = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    model = library.get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), config, "one")
    model.add_adapter("two", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in ("one", "two"):
            for factor in (layer_of(model).lora_A[adapter], layer_of(model).lora_B[adapter]):
                factor.weight.copy_(torch.randn(factor.weight.shape, generator=generator))
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def dense(model: Any) -> Tensor:
    """The nearest update of that rank, by the singular values of the sum itself."""
    layer = layer_of(model)
    parts = zip(("one", "two"), WEIGHTS, strict=True)
    total = sum(w * layer.get_delta_weight(name).double() for name, w in parts)
    u, s, vh = torch.linalg.svd(total)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def error_of_linear(model: Any) -> float:
    layer = layer_of(model)
    parts = zip(("one", "two"), WEIGHTS, strict=True)
    total = sum(w * layer.get_delta_weight(name).detach().double() for name, w in parts)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="linear")
    found = layer.get_delta_weight("sum").detach().double()
    return float((found - total).norm() / total.norm())


def combined(model: Any, name: str) -> tuple[float, Tensor]:
    started = time.perf_counter()
    model.add_weighted_adapter(["one", "two"], WEIGHTS, name, combination_type="svd", svd_rank=RANK)
    seconds = time.perf_counter() - started
    return seconds, layer_of(model).get_delta_weight(name).detach().double()


if __name__ == "__main__":
    main()
