"""The head found by trying the model, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.kernels.cross_entropy import LossForm
from rankfold.models.running.head import OutputHead, output_head
from tiny_models import ARCHITECTURES, tiny

FORMS = {
    "Gemma2": LossForm(softcap=30.0),
    "Gemma3Text": LossForm(softcap=2.0),
    "Granite": LossForm(scale=1 / 8),
    "HyperCLOVAX": LossForm(scale=3.0),
    "Cohere2": LossForm(scale=0.25),
}


def some_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_head_and_form_give_the_models_own_logits(architecture):
    model, inputs = tiny(architecture), some_inputs()
    head = output_head(model, inputs)
    assert isinstance(head, OutputHead), head
    assert head.form == FORMS.get(architecture, LossForm())
    with torch.no_grad():
        logits = head.form.logits(head.module(head.hidden_states(model, inputs)))
        torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_form_is_found_in_half_precision_too(dtype):
    for architecture in ("Gemma3Text", "Granite"):
        head = output_head(tiny(architecture).to(dtype), some_inputs())
        assert isinstance(head, OutputHead)
        assert head.form == FORMS[architecture]


def test_trying_the_head_leaves_no_hook_and_uses_up_no_random_number():
    model = tiny("GPT2").train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    head = output_head(model, some_inputs())
    assert torch.equal(torch.rand(3), wanted)
    head.hidden_states(model, some_inputs())
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert model.training


class Wrapped(nn.Module):
    """A model that does to its logits what ``change`` does."""

    def __init__(self, change):
        super().__init__()
        self.model, self.config, self.change = tiny("Llama"), tiny("Llama").config, change

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = self.change(outputs.logits)
        return outputs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: logits + 1, "more to its logits than to scale"),
        (lambda logits: logits * 1.01, "more to its logits than to scale"),
        (lambda logits: logits.clamp(max=39), "more to its logits than to scale"),
        (lambda logits: logits.roll(1, 1), "more to its logits than to scale"),
        (lambda logits: logits[..., :60], "not make its logits by one call"),
    ],
)
def test_a_model_that_does_more_to_its_logits_is_told_apart(change, reason):
    assert reason in output_head(Wrapped(change), some_inputs())


def test_a_model_without_a_head_of_its_own_is_told_apart():
    assert "which module is its output head" in output_head(nn.Module(), some_inputs())
    assert "no output head" in output_head(tiny("Llama").model, some_inputs())


def test_a_model_that_uses_its_head_twice_is_told_apart():
    model = tiny("Llama")

    def also_early(layer: nn.Module, args: object, out: torch.Tensor) -> None:
        model.lm_head(out)

    model.model.layers[0].register_forward_hook(also_early)
    assert "by one call of its head" in output_head(model, some_inputs())


def test_a_compiled_model_keeps_its_one_graph():
    model = tiny("Llama")
    assert "one graph" in output_head(torch.compile(model, backend="eager"), some_inputs())
    model.compile(backend="eager")
    assert "one graph" in output_head(model, some_inputs())


def test_a_head_with_an_adapter_a_copy_or_a_hook_is_called_as_a_module():
    def head_of(model):
        found = output_head(model, some_inputs())
        assert isinstance(found, OutputHead)
        return found

    assert head_of(tiny("Llama")).is_plain
    for config in (
        LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    ):
        assert not head_of(get_peft_model(tiny("Llama"), config)).is_plain
    hooked = tiny("Llama")
    hooked.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    assert not head_of(hooked).is_plain


def test_a_new_head_is_tried_anew():
    model = tiny_llama()
    assert output_head(model, some_inputs()).vocabulary == 49152
    model.set_output_embeddings(nn.Linear(32, 50, bias=False))
    assert output_head(model, some_inputs()).vocabulary == 50
