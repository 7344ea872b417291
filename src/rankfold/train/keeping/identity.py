"""What makes a run that run: the rows it sees, the base it stands on, and the code that computes it."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rankfold.data.tokens.rows_hash import rows_hash
from rankfold.errors import CheckpointError, bullet_list
from rankfold.kernels.forms import name_of
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.peft_surface import PeftModel
from rankfold.train.planning.plan import Plan
from rankfold.train.planning.start import adapter_hash

VERSIONS_OF = ("rankfold", "torch", "transformers")


def identity_of(plan: Plan) -> dict[str, Any]:
    """sha256 of the encoded rows (so tokenizer, template and split count too), the base's fingerprint, and
    by what it is computed, on which the last bits depend."""
    return {
        "train_rows": rows_hash(plan.train),
        "held_out_rows": rows_hash(plan.held_out),
        "base": asdict(fingerprint(plan.model.get_base_model(), trained_whole(plan.model))),
        "adapter": adapter_hash(plan.recipe.adapter),
        "computed_by": {
            **{name: version(name) for name in VERSIONS_OF},
            "threads": torch.get_num_threads(),
            "processes": plan.processes.count,
            "device": plan.model.device.type,
            "kernels": name_of(plan.model.device, plan.precision.compute),
        },
    }


def trained_whole(model: PeftModel) -> list[str]:
    """The modules that an adapter replaces as they are; they are no part of the base that it belongs to."""
    return [name for config in model.peft_config.values() for name in config.modules_to_save or ()]


def refuse_other_identity(saved: Any, now: dict[str, Any], path: Path) -> list[str]:
    """Raise CheckpointError listing what is no longer as it was when the run in ``path`` began; gives what
    has changed but may."""
    if not isinstance(saved, dict):
        raise CheckpointError(f"the record of the run in {path} does not say what it was trained on")
    told = {
        "train_rows": "the training rows (or the tokenizer, template or split) have changed",
        "held_out_rows": "the held-out rows have changed",
        "base": "the base model is another one",
    }
    problems = [text for name, text in told.items() if saved.get(name) != now[name]]
    if saved.get("adapter", "") != now.get("adapter", ""):
        problems.append("the adapter that it started from is another one")
    if problems:
        raise CheckpointError(bullet_list(f"the run in {path} cannot be resumed as it was:", problems))
    before, after = saved.get("computed_by", {}), now["computed_by"]
    changed = [
        f"{name} {before[name]} -> {after.get(name)}" for name in before if before[name] != after.get(name)
    ]
    return [f"not bit for bit what it would have been: {', '.join(changed)}"] if changed else []
