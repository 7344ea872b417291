"""How fast the LoRA core is, as ratios to bare layers and to PEFT in the same process.

    python benchmarks/lora_core.py

Each figure is the median of pairs: both sides in turn, so that a slow moment of the machine meets both.
Needs the packages of the ``test`` extra."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn

import rankfold

LAYERS = 896
PAIRS = 15


def seconds_of(action: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - started) / calls


def ratio(ours: Callable[[], object], other: Callable[[], object], calls: int, pairs: int = PAIRS) -> float:
    """The median over pairs of time(ours) / time(other)."""
    for action in (ours, other):
        seconds_of(action, calls // 10 + 1)
    return statistics.median(seconds_of(ours, calls) / seconds_of(other, calls) for _ in range(pairs))


def adapted(library: object) -> nn.Module:
    """A 16x16 linear layer adapted by ``library``, with a B that is not zero."""
    net = nn.Sequential(nn.Linear(16, 16))
    model = library.get_peft_model(net, library.LoraConfig(target_modules=["0"]))  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.get_base_model()[0]


def call_overhead(library: object) -> tuple[float, float]:
    """Time of an adapted layer's call over a bare ``nn.Linear``'s: forward without autograd, and
    forward with backward."""
    x = torch.randn(1, 16)
    bare, layer = nn.Linear(16, 16), adapted(library)
    with torch.no_grad():
        forward = ratio(lambda: layer(x), lambda: bare(x), calls=4000)
    both = ratio(lambda: layer(x).sum().backward(), lambda: bare(x).sum().backward(), calls=1000)
    return forward, both


def big_net() -> nn.Module:
    torch.manual_seed(0)  # an adapter loads onto the base that it was saved with
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(LAYERS)])


def times(prepare: Callable[[], object], action: Callable[[object], object]) -> float:
    prepared = prepare()
    started = time.perf_counter()
    action(prepared)
    return time.perf_counter() - started


def set_up() -> tuple[float, float]:
    """PEFT's time over ours: ``get_peft_model`` and ``load_adapter`` on 896 layers of 64x64."""
    options = {"target_modules": "all-linear"}

    def wrap(library: object) -> float:
        config = library.LoraConfig(**options)  # type: ignore[attr-defined]
        return times(big_net, lambda net: library.get_peft_model(net, config))  # type: ignore[attr-defined]

    wrapped = statistics.median(wrap(peft) / wrap(rankfold) for _ in range(7))
    with tempfile.TemporaryDirectory() as folder:
        rankfold.get_peft_model(big_net(), rankfold.LoraConfig(**options)).save_pretrained(folder)

        def load(library: object) -> float:
            config = library.LoraConfig(**options)  # type: ignore[attr-defined]
            return times(
                lambda: library.get_peft_model(big_net(), config),  # type: ignore[attr-defined]
                lambda model: model.load_adapter(Path(folder), adapter_name="second"),
            )

        loaded = statistics.median(load(peft) / load(rankfold) for _ in range(5))
    return wrapped, loaded


def main() -> None:
    warnings.simplefilter("ignore")
    for name, library in (("rankfold", rankfold), ("peft", peft)):
        forward, both = call_overhead(library)
        print(
            f"{name:9} 16x16 call over bare nn.Linear: {forward:.2f}x no grad, {both:.2f}x forward+backward"
        )
    wrapped, loaded = set_up()
    print(f"peft over rankfold, {LAYERS} layers: get_peft_model {wrapped:.1f}x, load_adapter {loaded:.1f}x")


if __name__ == "__main__":
    main()
