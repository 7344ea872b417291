"""NEFTune: noise on the embeddings of training rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.data.order.batch import Batch
from rankfold.train.step.objectives import Objective


@dataclass(frozen=True)
class Noisy:
    """An objective on embeddings to each of which uniform noise in +-``neftune_alpha`` / sqrt(L d) is added,
    for a row of L tokens and d features (Jain et al. 2023, arXiv 2310.05914, algorithm 1)."""

    objective: Objective
    neftune_alpha: float

    def sum(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        lengths = row_lengths(batch.inputs).unsqueeze(-1)

        def add_noise(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
            reach = self.neftune_alpha / math.sqrt(embedded.shape[-1]) * lengths.rsqrt()
            return embedded + (2 * torch.rand_like(embedded) - 1) * reach.to(embedded.dtype)

        hook = model.get_input_embeddings().register_forward_hook(add_noise)
        try:
            return self.objective.sum(model, batch)
        finally:
            hook.remove()


def row_lengths(inputs: dict[str, Tensor]) -> Tensor:
    """How many tokens the row of each token has, float32 like ``input_ids``, of padded and of packed rows."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(dim=1, keepdim=True).expand_as(inputs["input_ids"]).float()
    number = (inputs["position_ids"][0] == 0).cumsum(0) - 1
    return number.bincount()[number].float().unsqueeze(0)
