"""The figures of speed.py: which two sides each compares, and what is wanted of it."""

from __future__ import annotations

from dataclasses import dataclass

from parts.sides import ROW_LIMIT

SHORT, LONG = 256, 2048  # tokens of a row
TRL_SMALLEST = "trl in least memory"  # that one of its settings, tried in the first round only
UNITS = {"speed": "tokens/s", "memory": "GB at the peak", "time": "ms a token"}


@dataclass(frozen=True)
class Goal:
    """A figure to measure: two sides, and what the ratio of their ``measure`` should be."""

    name: str
    what: str
    ours: str
    theirs: str
    measure: str = "speed"
    at_least: float | None = None
    at_most: float | None = None


AGAINST = [
    ("peft_trainer_dropout_0", "PEFT + Trainer, padded to the longest row", "ours", "peft", 3.0, 1 / 3),
    ("peft_trainer_dropout_0.1", "the same with dropout 0.1", "ours dropout", "peft dropout", 3.5, 1 / 3),
    ("max_length", f"PEFT + Trainer, padded to {ROW_LIMIT} tokens", "ours", "max_length", 6.0, 1 / 5),
    ("trl_best", "TRL's SFTTrainer, its fastest setting", "ours", "trl", 4.0, 1 / 3),
]
GOALS = [
    *[Goal(name, what, ours, theirs, at_least=faster) for name, what, ours, theirs, faster, _ in AGAINST],
    Goal("roofline", "the step's matrix products alone", "ours", "roofline", at_least=0.75),
    Goal(
        "as_they_come",
        "each in the number format that it takes by itself: ours in bfloat16, PEFT + Trainer in float32",
        "ours bfloat16",
        "peft",
    ),
    Goal(
        "bfloat16",
        "PEFT + Trainer in bfloat16 (autocast, bf16=True), as ours",
        "ours bfloat16",
        "peft bfloat16",
        at_least=3.0,
    ),
    Goal(
        "bfloat16_gain",
        "in bfloat16, which this machine gets by default, to float32",
        "ours bfloat16",
        "ours",
        at_least=2.5,
    ),
    Goal(
        "roofline_bfloat16",
        "in bfloat16, the step's matrix products alone",
        "ours bfloat16",
        "roofline bfloat16",
        at_least=0.4,
    ),
    Goal(
        "bfloat16_memory",
        "PEFT + Trainer in bfloat16",
        "ours bfloat16",
        "peft bfloat16",
        "memory",
        at_most=0.3,
    ),
    Goal("compile", "with compile, in float32, to without", "ours compile", "ours"),
    *[
        Goal(f"{name}_memory", what, ours, theirs, "memory", at_most=share)
        for name, what, ours, theirs, _, share in AGAINST
    ],
    Goal(
        "trl_smallest_memory",
        "TRL's SFTTrainer in its least memory",
        "ours",
        TRL_SMALLEST,
        "memory",
        at_most=0.4,
    ),
    Goal(
        "trl_smallest_recomputed_memory",
        "the same, ours with activations recomputed",
        "ours recomputed",
        TRL_SMALLEST,
        "memory",
    ),
    Goal("recomputed", "activations recomputed, to kept", "ours recomputed", "ours"),
    Goal("rank_64", "rank 64 to rank 8", "ours rank 64", "ours", "time", at_most=1.25),
    Goal("rank_64_products", "the same, the matrix products alone", "roofline rank 64", "roofline", "time"),
    Goal(
        f"row_{LONG}",
        f"rows of {LONG} to rows of {SHORT} tokens",
        "ours long",
        "ours short",
        "time",
        at_most=1.6,
    ),
]
