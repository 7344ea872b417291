"""How many operations a step is made of: an exact number, which may fall and may not grow."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batching import Packed
from rankfold.data.tokens.encode import EncodedRow
from rankfold.kernels import forms
from rankfold.models.base.precision import Precision
from rankfold.models.running.fusing import fuse
from rankfold.models.running.rows_apart import attend_rows_apart
from rankfold.train.planning.trial import Trial

LENGTHS = [236, 235, 223, 222, 108]  # as GSM8K's rows are
FEW, MANY = 2, 4
VIEWS = ("view", "t", "transpose", "slice", "select", "split", "expand", "unsqueeze", "alias", "detach")
VIEWS += ("_unsafe_view", "permute", "squeeze", "split_with_sizes", "as_strided", "unbind")


class Counted(TorchDispatchMode):
    """What is computed, by its name; a view computes nothing."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names[operation.__name__.split(".")[0]] += 1
        return operation(*args, **(kwargs or {}))


def operations(layers, dtype):
    """Of forward and backward of one block."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(config).to(dtype)
    attend_rows_apart(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse(model, dtype)
    rows = [EncodedRow(str(length), [5] * length, [5] * length) for length in LENGTHS]
    trial = Trial(model, rows, 0, Precision.of(str(dtype).removeprefix("torch.")))
    trial.seconds(rows, Packed())
    with Counted() as counted:
        trial.seconds(rows, Packed())
    return counted.names


@pytest.mark.parametrize(
    ("dtype", "by_numba", "most"),
    [(torch.float32, False, 188), (torch.bfloat16, False, 337), (torch.bfloat16, True, 250)],
)
def test_a_layer_takes_no_more_operations_than_it_did(dtype, by_numba, most, monkeypatch):
    if by_numba:
        pytest.importorskip("numba", reason="the extra named fast is not installed")
    else:
        monkeypatch.setattr("rankfold.models.running.fusing.use_numba", lambda *_: "not wanted")
    monkeypatch.setattr(forms, "_table", {})
    few, many = (operations(layers, dtype) for layers in (FEW, MANY))
    a_layer = {name: (many[name] - few[name]) // (MANY - FEW) for name in many}
    computed = {name: count for name, count in a_layer.items() if name not in VIEWS}
    assert sum(computed.values()) <= most, computed
