from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batching import Packed
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.running.rows_apart import attend_rows_apart
from rankfold.train.compiling import compile_layers, decoder_layers
from rankfold.train.step.objectives import Supervised

# What torch's compiler does to itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch._dynamo.reset()


def model():
    base = tiny_llama()
    attend_rows_apart(base)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(wrapped)
    return wrapped.train()


def loss_and_gradients(wrapped, lengths):
    rows = [EncodedRow(str(n), list(range(3, 3 + n)), list(range(3, 3 + n))) for n in lengths]
    loss, _ = Supervised().sum(wrapped, Packed().collate(rows, 0, "cpu"))
    wrapped.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients_for_rows_of_any_length():
    plain, compiled = model(), model()
    compile_layers(compiled)
    for lengths in ([5, 9], [31, 4, 17], [300]):
        loss, gradients = loss_and_gradients(plain, lengths)
        found_loss, found = loss_and_gradients(compiled, lengths)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_what_is_judged_is_not_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: lambda *a, **k: calls.append(f) or f(*a, **k))
    wrapped = model()
    compile_layers(wrapped)
    ids = torch.tensor([[5, 6, 7]])
    wrapped.eval()(input_ids=ids)
    assert not calls
    wrapped.train()(input_ids=ids)
    assert len(calls) == len(decoder_layers(wrapped)) > 0


def test_names_and_weights_stay():
    wrapped = model()
    before = [name for name, _ in wrapped.named_parameters()]
    compile_layers(wrapped)
    assert [name for name, _ in wrapped.named_parameters()] == before


def test_a_model_without_decoder_layers_is_refused():
    wrapped = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="compile: Sequential names no decoder layers"):
        compile_layers(wrapped)


def test_where_there_is_no_compiler_one_sentence_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    wrapped = model()
    compile_layers(wrapped)
    with pytest.raises(ConfigError, match=r"compile: torch.compile cannot do it here: .*; leave compile out"):
        loss_and_gradients(wrapped, [11, 2])
