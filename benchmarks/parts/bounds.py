"""What bounds the figures that are not reached, in words and in other figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PRODUCTS = (
    "the step's matrix products alone, by torch's own BLAS, are {} times as fast as the other side here"
)
BOUNDS = {
    "peft_trainer_dropout_0": PRODUCTS.format("{products_to_peft_trainer_dropout_0:.2f}")
    + "; of our step {share_products_float32:.0%} are such products and {share_attention_float32:.0%} are "
    "attention. In the number format that each takes by itself the ratio is {as_they_come:.2f}",
    "peft_trainer_dropout_0.1": PRODUCTS.format("{products_to_peft_trainer_dropout_0.1:.2f}")
    + ", without drawing a mask",
    "max_length": PRODUCTS.format("{products_to_max_length:.2f}"),
    "trl_best": PRODUCTS.format("{products_to_trl_best:.2f}"),
    "roofline": "beside the products ({share_products_float32:.0%}) a step is attention "
    "({share_attention_float32:.0%}) and passes over memory: norms, rotary positions, gating, the loss "
    "({share_rest_float32:.0%})",
    "max_length_memory": "base and program take as much on either side. With activations recomputed it is "
    "{recomputed_gb:.2f} GB, at {recomputed:.2f} of the speed",
    "trl_best_memory": "packed, TRL has blocks of 1,024 tokens as we do: activations, base and program "
    "stand on both sides. With activations recomputed the ratio is "
    "{trl_smallest_recomputed_memory:.3f}, at {recomputed:.2f} of the speed",
    "rank_64": "the matrix products alone cost {rank_64_products:.2f} times as much",
    "generation_one": "a step reads every weight once, whoever makes it; the rest is the start of some two "
    "thousand small operations, and the prompt",
    "generation_held": "before the first token the blocks are expanded, once; then the steps are the same",
    "generation_32_at_once": "with so many rows products are bound by arithmetic, no longer by reading "
    "weights, and the prompts are read at that speed too",
    "trunk_kept_loss": "fewer layers learn less from the same rows, however fast; so no trunk is kept",
    "held_gguf_speed": "each product is preceded by the expansion of its weight, forward and backward",
}
AGAINST = ("peft_trainer_dropout_0", "peft_trainer_dropout_0.1", "max_length", "trl_best")


def told(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each figure that was measured and not reached; without numbers that are not there."""
    numbers = _numbers(entries)
    lines = []
    for entry in entries:
        if entry["reached"] is False:
            text = _filled(BOUNDS.get(entry["name"], ""), numbers)
            lines.append(f"- `{entry['name']}`: {text or 'not looked into'}.")
    return lines


def _numbers(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    by_name = {entry["name"]: entry for entry in entries if entry["ratio"] is not None}
    numbers = {name: entry["ratio"] for name, entry in by_name.items()}
    if roofline := by_name.get("roofline"):
        numbers |= {
            f"products_to_{n}": roofline["theirs"] / by_name[n]["theirs"] for n in AGAINST if n in by_name
        }
    if recomputed := by_name.get("trl_smallest_recomputed_memory"):
        numbers["recomputed_gb"] = recomputed["ours"]
    return numbers


def _filled(text: str, numbers: dict[str, float]) -> str:
    for name, value in numbers.items():
        for form in (":.2f", ":.3f", ":.0%"):
            text = text.replace(f"{{{name}{form}}}", format(value, form[1:]))
    return "" if "{" in text else text
