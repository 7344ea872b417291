"""Several adapters at a time, beside PEFT: a batch that they share, training it, 100 of them, and DoRA.

python benchmarks/many_adapters.py"""

from __future__ import annotations

import resource
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import peft
import torch
from parts.figures import Figure, record
from torch import Tensor, nn

import rankfold
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.load import load_base

ADAPTERS, ROWS, RANK, LAYERS = 8, 32, 16, 4
NAMES = [f"task{place}" for place in range(ADAPTERS)]
ROWS_OF = [NAMES[place % ADAPTERS] for place in range(ROWS)]
PAIRS, HUNDRED, TOKENS = 15, 100, 64


def main() -> None:
    warnings.simplefilter("ignore")
    figures = [
        shared_batch(size, tokens, held=held)
        for size in (576, 2048)
        for tokens, held in ((1, False), (1, True), (16, False))
    ]
    record([*figures, *trained(), hundred()])


def seconds_of(action: Callable[[], object], calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - started) / calls


def in_turn(
    ours: Callable[[], object], other: Callable[[], object], calls: int, pairs: int = PAIRS
) -> list[Any]:
    for action in (ours, other):
        seconds_of(action, max(2, calls // 5))
    return [(seconds_of(ours, calls), seconds_of(other, calls)) for _ in range(pairs)]


def figure(name: str, what: str, pairs: list[Any], **goal: Any) -> Figure:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [own / other for own, other in pairs]
    return Figure(name=name, what=what, unit="s", ratios=ratios, ours=ours, theirs=theirs, **goal)


def layered(library: Any, size: int) -> Any:
    """Linear layers with eight adapters of random factors, the same in either library."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(size, size) for _ in range(LAYERS)])
    config = library.LoraConfig(r=RANK, target_modules=[str(place) for place in range(LAYERS)])
    model = library.get_peft_model(net, config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / size**0.5
    return model.eval()


@torch.no_grad()
def shared_batch(size: int, tokens: int, *, held: bool = False) -> Figure:
    """A batch's forward; ``held`` as in an answer, whose forwards know the adapters of the rows already."""
    models = [layered(library, size) for library in (rankfold, peft)]
    x = torch.randn(ROWS, tokens, size)
    words = {"adapter_names": ROWS_OF}
    away = apart(models[0], x)
    plain = nn.Sequential(*[nn.Linear(size, size) for _ in range(LAYERS)])
    runs = [partial(model, x, **words) for model in models]
    calls = max(2, 30_000 // (size * tokens))
    with ExitStack() as stack:
        if held:
            stack.enter_context(models[0]._enable_peft_forward_hooks(**words))
            stack.enter_context(models[1]._enable_peft_forward_hooks(**words))
            runs = [partial(model.get_base_model(), x) for model in models]
        pairs = in_turn(runs[0], runs[1], calls)
    base = statistics.median(seconds_of(partial(plain, x), calls) for _ in range(PAIRS))
    own, other = (statistics.median(side) - base for side in zip(*pairs, strict=True))
    answering = ", while an answer is written" * held
    what = (
        f"{ADAPTERS} adapters of rank {RANK} over {ROWS} rows of {tokens} token{'s' * (tokens > 1)}, "
        f"{LAYERS} layers of {size} x {size}{answering}, to PEFT's time; without the layers themselves "
        f"{own * 1e3:.2f} ms to {other * 1e3:.2f} ms; {away:.1e} from the single runs"
    )
    return figure(f"mixed_batch_{size}_{tokens}{'_held' * held}", what, pairs, at_most=1 / 3)


def apart(model: Any, x: Tensor) -> float:
    """The largest difference between a shared batch and each adapter alone on its rows, relative."""
    found = model(x, adapter_names=ROWS_OF)
    alone = torch.empty_like(found)
    for name in NAMES:
        model.set_adapter(name)
        rows = [row for row, own in enumerate(ROWS_OF) if own == name]
        alone[rows] = model(x[rows])
    return float((found - alone).abs().max() / alone.abs().max())


def real(library: Any, **options: Any) -> Any:
    config = library.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    return library.get_peft_model(load_base(DEFAULT_MODEL).model.float(), config, NAMES[0])


IDS = torch.randint(0, 40000, (2 * ADAPTERS, TOKENS), generator=torch.Generator().manual_seed(0))


def step(model: Any, **words: Any) -> None:
    model(input_ids=IDS, labels=IDS, **words).loss.backward()
    model.zero_grad()


def trained() -> list[Figure]:
    """A step with eight adapters in the batch to one with one, and one with DoRA to one without."""
    names = [name for name in NAMES for _ in range(2)]
    plain, shared, dora = real(rankfold), real(rankfold), real(rankfold, use_dora=True)
    for name in NAMES[1:]:
        shared.add_adapter(name, shared.peft_config[NAMES[0]])
    shared.set_requires_grad(NAMES)
    text = f"{len(IDS)} rows of {TOKENS} tokens, a training step on SmolLM2-135M"
    alone = partial(step, plain.train())
    several = in_turn(partial(step, shared.train(), adapter_names=names), alone, 1, 5)
    rescaled = in_turn(partial(step, dora.train()), alone, 1, 5)
    del shared, plain, dora, alone
    theirs = in_turn(
        partial(step, real(peft, use_dora=True).train()), partial(step, real(peft).train()), 1, 5
    )
    return [
        figure(
            "mixed_step", f"{ADAPTERS} adapters in a batch to one adapter's: {text}", several, at_most=1.15
        ),
        figure("dora_step", f"DoRA to plain LoRA: {text}", rescaled, at_most=1.2),
        figure("dora_step_peft", f"the same in PEFT: {text}", theirs),
    ]


def hundred() -> Figure:
    """Switching among a hundred adapters, and what they take beside their numbers."""
    model = real(rankfold).eval()
    config = model.peft_config[NAMES[0]]
    one = sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in range(1, HUNDRED):
        model.add_adapter(f"more{place}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()  # memory is given to what is written
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    switches = [switch_seconds(model, inference=inference) for inference in (True, False)]
    what = (
        f"switching among {HUNDRED} adapters of rank {RANK} on SmolLM2-135M that answer, to 1 ms (that are "
        f"trained: {statistics.median(switches[1]) * 1e3:.1f} ms); they take "
        f"{taken / ((HUNDRED - 1) * one):.2f} times their numbers' memory"
    )
    return figure("switch", what, [(each, 1e-3) for each in switches[0]], below=1.0)


def switch_seconds(model: Any, *, inference: bool) -> list[float]:
    names = [f"more{place}" for place in range(1, HUNDRED)]
    return [seconds_of(partial(model.set_adapter, name, inference_mode=inference)) for name in names]


if __name__ == "__main__":
    main()
