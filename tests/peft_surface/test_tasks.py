from __future__ import annotations

import inspect

import peft
import pytest
import torch
from torch import nn

import rankfold
from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def bert(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **SIZES)
    return getattr(transformers, kind)(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


IDS = torch.arange(12).view(2, 6) + 1
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TYPES = (IDS > 3).long()
TASKS = {
    "SEQ_CLS": (lambda: bert("BertForSequenceClassification"), "query", {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": (lambda: bert("BertForTokenClassification"), "query", {"labels": IDS % 2}),
    "QUESTION_ANS": (
        lambda: bert("BertForQuestionAnswering"),
        "query",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
    ),
    "FEATURE_EXTRACTION": (lambda: bert("BertModel"), "query", {"output_hidden_states": True}),
    "CAUSAL_LM": (tiny_llama, "q_proj", {"labels": IDS}),
    "SEQ_2_SEQ_LM": (t5, "q", {"labels": IDS, "decoder_attention_mask": MASK}),
}


@pytest.fixture
def pair(request):
    """The same adapted model here and in PEFT, with equal factors and heads."""
    make, target, inputs = TASKS[request.param]
    ours = get_peft_model(make(), LoraConfig(r=2, target_modules=[target], task_type=request.param)).eval()
    config = peft.LoraConfig(r=2, target_modules=[target], task_type=request.param)
    theirs = peft.get_peft_model(make(), config).eval()
    randomise(ours)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "modules_to_save." in name:
                parameter.add_(0.25)
    peft.set_peft_model_state_dict(theirs, rankfold.get_peft_model_state_dict(ours))
    return ours, theirs, inputs


@pytest.mark.parametrize("pair", TASKS, indirect=True)
@pytest.mark.peft("`PeftModelFor...` by task type", "same", "same")
def test_each_task_has_pefts_class_signature_and_output(pair):
    ours, theirs, inputs = pair
    assert type(ours).__name__ == type(theirs).__name__
    assert getattr(rankfold, type(ours).__name__) is type(ours)
    names = [list(inspect.signature(model.forward).parameters) for model in pair[:2]]
    assert names[0] == [name for name in names[1] if name != "task_ids"]
    out, expected = (model(IDS, attention_mask=MASK, **inputs) for model in (ours, theirs))
    assert out.keys() == expected.keys()
    for key in expected:
        if isinstance(expected[key], torch.Tensor):
            torch.testing.assert_close(out[key], expected[key])


@pytest.mark.parametrize("pair", TASKS, indirect=True)
def test_each_task_is_saved_for_peft_and_read_from_it(pair, tmp_path):
    ours, theirs, inputs = pair
    make = TASKS[str(ours.peft_config["default"].task_type)][0]
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = ours(IDS, attention_mask=MASK, **inputs)[0]
    for folder in ("ours", "theirs"):
        there = peft.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        here = PeftModel.from_pretrained(make(), tmp_path / folder)
        assert type(here) is type(ours)
        torch.testing.assert_close(there(IDS, attention_mask=MASK, **inputs)[0], expected)
        torch.testing.assert_close(here(IDS, attention_mask=MASK, **inputs)[0], expected)


@pytest.mark.parametrize("pair", ["QUESTION_ANS"], indirect=True)
@pytest.mark.peft("`token_type_ids` in question answering", "dropped", "passed on")
def test_question_answering_passes_the_token_types_on_where_peft_drops_them(pair):
    ours, theirs, _ = pair
    merged = ours.get_base_model()
    expected = merged(IDS, token_type_ids=TYPES).start_logits
    torch.testing.assert_close(ours(IDS, token_type_ids=TYPES).start_logits, expected)
    dropped = theirs(IDS, token_type_ids=TYPES).start_logits
    torch.testing.assert_close(dropped, ours(IDS).start_logits)
    assert not torch.allclose(dropped, expected)


@pytest.mark.parametrize("pair", ["QUESTION_ANS"], indirect=True)
def test_question_answering_passes_the_positions_on(pair):
    ours, _, _ = pair
    places = torch.arange(6).flip(0)[None].expand(2, 6)
    expected = ours.get_base_model()(IDS, position_ids=places).start_logits
    assert torch.equal(ours(IDS, position_ids=places).start_logits, expected)


def test_a_base_that_takes_only_token_ids_can_be_wrapped():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids))

    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        model = get_peft_model(Plain(), LoraConfig(target_modules=["head"], task_type=task))
        assert model(IDS).shape == (2, 6, 20)


def test_generation_obeys_a_config_that_was_set_on_the_wrapper():
    from transformers import GenerationConfig

    for make, target, task in ((tiny_llama, "q_proj", "CAUSAL_LM"), (t5, "q", "SEQ_2_SEQ_LM")):
        model = get_peft_model(make(), LoraConfig(target_modules=[target], task_type=task)).eval()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 0}
        model.generation_config = GenerationConfig(max_new_tokens=3, **options)
        start = 1 if task == "SEQ_2_SEQ_LM" else IDS.shape[1]
        assert model.generate(input_ids=IDS).shape == (2, start + 3)
        assert model.generate(input_ids=IDS, max_new_tokens=5).shape == (2, start + 5)


def test_an_input_too_many_or_given_twice_is_named():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="forward got twice: input_ids"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="forward takes the inputs input_ids, .* got 8 by position"):
        model(ids, *[None] * 7)
