"""Where the time of a training step goes, from a profile.

    python benchmarks/shares.py gsm8k_test.jsonl

SmolLM2 with a rank 8 adapter on all linear layers goes forward and backward through a micro-batch of rows,
answers trained, in float32 and in bfloat16.  Each operation's own CPU time counts as a matrix product of a
layer or the head, as attention, or as the rest: norms, rotary positions, gating, the loss, sums, copies."""

from __future__ import annotations

import statistics

from parts.figures import Figure, parser, record
from parts.trials import encoded, packed, tokens_per_second, trial
from torch.profiler import ProfilerActivity, profile

from rankfold.models.base.precision import Precision

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
ATTENTION = ("scaled_dot_product", "bmm", "softmax", "flash_attention")
KINDS = {"products": "matrix products", "attention": "attention", "rest": "everything else"}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args()
    rows = encoded(options)
    for dtype in ("float32", "bfloat16"):
        side = trial(options, rows, "all", Precision.of(dtype))
        tokens_per_second(side, packed())
        taken = []
        for _ in range(options.rounds):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                tokens_per_second(side, packed())
            taken.append(seconds_by_kind(seen))
        record([share(dtype, kind, taken) for kind in KINDS])


def seconds_by_kind(seen: profile) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found


def kind_of(operation: str) -> str:
    if operation in PRODUCTS:
        return "products"
    return "attention" if any(part in operation for part in ATTENTION) else "rest"


def share(dtype: str, kind: str, taken: list[dict[str, float]]) -> Figure:
    return Figure(
        name=f"share_{kind}_{dtype}",
        what=f"{KINDS[kind]}, as a share of the time of forward and backward in {dtype}",
        unit="s",
        ratios=[each[kind] / sum(each.values()) for each in taken],
        ours=statistics.median(each[kind] for each in taken),
        theirs=statistics.median(sum(each.values()) for each in taken),
    )


if __name__ == "__main__":
    main()
