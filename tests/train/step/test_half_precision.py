"""bfloat16 as we compute it against PEFT and transformers in bfloat16, both held against float32."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold.data.order.batching import Packed
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.kernels import forms
from rankfold.models.base.precision import Precision
from rankfold.models.running.fusing import fuse
from rankfold.models.running.rows_apart import attend_rows_apart
from rankfold.train.step.objectives import Supervised

HALF = torch.bfloat16
LENGTHS = [70, 66, 50, 21]
STEPS, RATE = 20, 0.3


@pytest.fixture(params=["torch", "numba"])
def by(request, monkeypatch):
    for module in ("lora.layers.linear", "models.running.norms", "models.running.rotary"):
        monkeypatch.setattr(f"rankfold.{module}.FUSED_FROM", 0)
    monkeypatch.setattr(forms, "_table", {})
    if request.param == "torch":
        monkeypatch.setattr("rankfold.models.running.fusing.use_numba", lambda *_: "not wanted")
    else:
        pytest.importorskip("numba", reason="the extra named fast is not installed")


def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def rows(vocabulary):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    return [EncodedRow(str(n), row, [IGNORE] * 5 + row[5:]) for n, row in enumerate(ids)]


def adapted(library, model):
    """With the same random adapter by either library, in float32."""
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = library.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.02 if "lora_A" in name else 0.01) * random
    return model.train()


def ours(model, dtype):
    attend_rows_apart(model.to(dtype))
    model = adapted(rankfold, model)
    told = fuse(model, dtype)
    assert not re.search(r"\b0 of", told)

    def loss(rows):
        with Precision.of(str(dtype).removeprefix("torch.")).autocast(model.device):
            batch = Packed().collate(rows, 0, model.device)
            return Supervised().sum(model, batch)[0] / batch.targets.weight

    return model, loss


def theirs(model, dtype):
    model = adapted(peft, model.to(dtype))

    def loss(rows):
        total, tokens = 0.0, 0
        for row in rows:
            trained = sum(label != IGNORE for label in row.labels)
            with torch.autocast("cpu", HALF, enabled=dtype == HALF):
                found = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
            total, tokens = total + found.loss * trained, tokens + trained
        return total / tokens

    return model, loss


def gradient(side, rows):
    model, loss = side
    loss(rows).backward()
    found = [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return torch.cat([each.flatten() for each in found])


def curve(side, rows):
    model, loss = side
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        losses.append(loss(rows))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    return torch.stack(losses).detach()


def errors(measure, model, rows):
    """Of ours and of theirs in bfloat16, as shares of what float32 gives."""
    exact = measure(theirs(copy.deepcopy(model), torch.float32), rows)
    halves = (measure(side(copy.deepcopy(model), HALF), rows) for side in (ours, theirs))
    return [float((half - exact).norm() / exact.norm()) for half in halves]


def test_gradients_are_no_further_from_float32s_than_theirs(by):
    found, allowed = errors(gradient, base(), rows(300))
    assert found <= 1.05 * allowed < 0.05


def test_losses_of_twenty_steps_are_no_further_from_float32s_than_theirs(by):
    found, allowed = errors(curve, base(), rows(300))
    assert found <= 1.2 * allowed < 0.01


@pytest.mark.slow
def test_on_the_real_model_gradients_are_no_further_from_float32s_than_theirs(by, real_base):
    """On average: which of two roundings is the luckier one differs by row."""
    model = copy.deepcopy(real_base.model).float()
    texts = ["It was cold. " * 9, "Why did the rain go to the party? " * 6, "1 + 1 = 2, 2 + 2 = 4, " * 5]
    ids = [real_base.tokenizer(text).input_ids for text in texts]
    pairs = [errors(gradient, model, [EncodedRow("", row, row)]) for row in ids]
    found, allowed = (sum(each) / len(each) for each in zip(*pairs, strict=True))
    assert found <= 1.05 * allowed < 0.2
