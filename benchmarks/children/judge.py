"""Child process: the loss of the base and of adapters on held-out rows, all by the same plain function.

transformers loads the base, PEFT the adapters (both sides write its format), and the loss is
``F.cross_entropy`` over one row at a time, without padding."""

from __future__ import annotations

from typing import Any

import torch
from parts.sides import Job, Result, be_child
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM


def judge(job: Job) -> Result:
    """The summed loss of each of ``rows`` in nats, for the base and for each of ``adapters``."""
    trained = [len(row["labels"]) - row["labels"].count(-100) for row in job["rows"]]
    losses = {"base": row_losses(load_base(job), job["rows"])}
    for name, path in job["adapters"].items():
        model = PeftModel.from_pretrained(load_base(job), path)
        losses[name] = row_losses(model, job["rows"])
    return {"losses": losses, "trained": trained}


def load_base(job: Job) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model.to("cuda") if torch.cuda.is_available() else model


@torch.no_grad()
def row_losses(model: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    model.eval()
    sums = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        wanted = torch.tensor(row["labels"][1:], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        sums.append(float(F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")))
    return sums


if __name__ == "__main__":
    be_child(judge)
