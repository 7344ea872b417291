from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OPTIONS = [
    {},
    {"use_rslora": True, "lora_bias": True},
    pytest.param({"use_dora": True}, marks=pytest.mark.slow),
    {"lora_dropout": 0.5},
]


def model(**options) -> PeftModel:
    wrapped = get_peft_model(tiny_llama(), LoraConfig(**CONFIG | options))
    randomise(wrapped)
    return wrapped.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch._dynamo.reset()


def compiled(wrapped: PeftModel, backend: str = "aot_eager") -> Any:
    return torch.compile(copy.deepcopy(wrapped), fullgraph=True, backend=backend)


def gradients(wrapped: PeftModel, ids: torch.Tensor, call: Any = None) -> dict[str, torch.Tensor]:
    wrapped.zero_grad()
    (wrapped if call is None else call)(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.peft("`torch.compile(fullgraph=True)`", "same", "same")
def test_the_adapted_model_is_one_graph_with_equal_outputs(options, ids):
    wrapped = model(**options)
    call = compiled(wrapped)
    for rows in (ids, ids[:1]):
        with torch.no_grad():
            torch.testing.assert_close(call(input_ids=rows).logits, wrapped(input_ids=rows).logits)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_its_gradients_are_equal(options, ids):
    wrapped = model(**options).train()
    call = compiled(wrapped)
    expected = gradients(wrapped, ids)
    found = gradients(call._orig_mod, ids, call)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_change_of_state_is_seen_by_the_compiled_model(ids):
    wrapped = model()
    call = compiled(wrapped)
    inner = call._orig_mod
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        torch.testing.assert_close(call(input_ids=ids).logits, expected)
        with inner.disable_adapter():
            torch.testing.assert_close(call(input_ids=ids).logits, tiny_llama()(ids).logits)
        inner.merge_adapter()
        torch.testing.assert_close(call(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        inner.unmerge_adapter()
        torch.testing.assert_close(call(input_ids=ids).logits, expected)
        randomise(inner, seed=8)
        randomise(wrapped, seed=8)
        torch.testing.assert_close(call(input_ids=ids).logits, wrapped(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_inductor_compiles_it_forwards_and_backwards(ids):
    wrapped = model().train()
    call = compiled(wrapped, "inductor")
    expected = gradients(wrapped, ids)
    found = gradients(call._orig_mod, ids, call)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=str)
def test_activation_checkpointing_gives_equal_gradients(reentrant, options, ids):
    wrapped = model(**options).train()
    torch.manual_seed(5)
    expected = gradients(wrapped, ids)
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    found = gradients(wrapped, ids)
    assert wrapped.get_base_model().model.layers[0].gradient_checkpointing
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"num_beams": 2, "do_sample": False}, {"do_sample": True, "top_k": 20}],
    ids=str,
)
@pytest.mark.peft("`generate`, beam search included", "same", "same")
def test_generation_gives_pefts_tokens(how, ids, tmp_path):
    ours = model()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    texts = []
    for wrapped in (tiny_llama(), ours, theirs):
        torch.manual_seed(2)
        options = {"max_new_tokens": 8, "pad_token_id": 0, **how}
        texts.append(wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    assert texts[1].equal(texts[2])
    assert not texts[1].equal(texts[0])
