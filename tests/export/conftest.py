"""A base's folder and that of an adapter on it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankfold
from conftest import tiny_llama


@pytest.fixture
def adapted(tmp_path, real_base):
    """A base's folder and that of an adapter on it, whose numbers are all drawn."""

    def make(*, tied=False, dtype=torch.float32, **options):
        tiny_llama(tied=tied).to(dtype).save_pretrained(tmp_path / "base")
        real_base.tokenizer.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        options = {"target_modules": ["q_proj"]} | options
        tuned = rankfold.get_peft_model(model, rankfold.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        tuned.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make
