from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.lora.files.fingerprint import SAMPLES, BaseFingerprint, compare, fingerprint

GOLDEN = ("17cf9a91f06695ca", "a394edf2620f92a6", "bfloat16")


@pytest.fixture(scope="module")
def plain() -> BaseFingerprint:
    return fingerprint(tiny_llama())


def test_equal_bases_have_equal_fingerprints_and_others_do_not(plain):
    assert fingerprint(tiny_llama()) == plain
    other = fingerprint(tiny_llama(seed=1))
    assert other.shapes == plain.shapes
    assert other.values != plain.values
    assert compare(plain, other) == ("the weights differ", None)
    assert compare(plain, plain) == (None, None)


def test_the_fingerprint_of_a_known_model_is_fixed():
    """Files carry it from one release to the next."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.fill_(0.5)
    found = fingerprint(nn.Sequential(layer))
    assert (found.shapes[:16], found.values[:16], found.storage) == GOLDEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_survives_loading_one_checkpoint_in_other_widths(plain, dtype):
    assert fingerprint(tiny_llama().to(dtype)) == plain


def test_a_float16_copy_is_not_called_another_base(plain):
    problem, unchecked = compare(plain, fingerprint(tiny_llama().half()))
    assert problem is None
    assert "bfloat16 when it was saved, float16 here" in unchecked


def test_other_shapes_are_told_even_between_widths(plain):
    small = nn.Linear(2, 2).half()
    assert compare(plain, fingerprint(small)) == ("the names or shapes of its parameters differ", None)


def test_packed_weights_are_compared_with_their_like_only(plain):
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    found = fingerprint(packed)
    assert found.storage == "uint8"
    assert compare(found, fingerprint(packed)) == (None, None)
    assert compare(plain, found)[0] is None
    packed.weight.data[3] = 77
    assert compare(found, fingerprint(packed))[0] == "the weights differ"


def test_weights_that_are_not_there_are_not_read():
    assert fingerprint(nn.Linear(3, 3, device="meta")).storage == "meta"


def test_every_parameter_counts(plain):
    for name, parameter in tiny_llama().named_parameters():
        model = tiny_llama()
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        assert fingerprint(model).values != plain.values, name
        assert parameter.numel() > 0


def test_the_sample_runs_over_rows_and_columns():
    """With a stride of a multiple of the row length only the first column would count."""
    layer = nn.Linear(64, 64, bias=False)
    before = fingerprint(layer)
    changed = 0
    for column in range(64):
        other = nn.Linear(64, 64, bias=False)
        other.load_state_dict(layer.state_dict())
        with torch.no_grad():
            other.weight[:, column] += 1
        changed += fingerprint(other) != before
    assert changed > 48
    assert SAMPLES == 64


def test_it_takes_less_than_a_second_for_the_real_model(real_base):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        fingerprint(real_base.model)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


STATES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
    {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
]


@pytest.mark.parametrize("options", STATES, ids=str)
def test_adapters_leave_the_fingerprint_of_the_base_alone(options):
    def base() -> nn.Module:
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
        return model

    before = fingerprint(base())
    model = get_peft_model(base(), LoraConfig(r=2, **options))
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25)
    inner = model.get_base_model()
    assert fingerprint(inner) == before
    model.merge_adapter()
    assert fingerprint(inner) == before
    model.unmerge_adapter()
    with model.disable_adapter():
        assert fingerprint(inner) == before
    assert fingerprint(inner) == before
    assert fingerprint(model.unload()) == before


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_second_adapter_beside_a_base_changing_one_belongs_to_the_original_base(start, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=start))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_head_that_starts_at_random_is_no_mark_of_the_base(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def classifier(head_seed: int) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForSequenceClassification(config).eval()
        nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(head_seed))
        return model

    get_peft_model(classifier(1), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(
        tmp_path
    )
    loaded = PeftModel.from_pretrained(classifier(2), tmp_path)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, classifier(1)(ids).logits)
