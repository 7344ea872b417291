from __future__ import annotations

import json
from contextlib import suppress

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, RankfoldError

OPTIONS = [
    {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "mlp.up_proj"], "use_rslora": True},
    {"r": 2, "target_modules": r".*\.layers\.1\..*(k|down)_proj", "task_type": "CAUSAL_LM"},
    {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1], "task_type": "CAUSAL_LM"},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}},
    {"r": 4, "task_type": "CAUSAL_LM"},
]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path):
    """An adapter folder with random factors."""
    model = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS[0]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_written_here_gives_equal_logits_in_peft(options, tmp_path, ids):
    ours = get_peft_model(tiny_llama(), LoraConfig(**options)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(input_ids=ids).logits)
    assert not torch.allclose(tiny_llama()(ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_written_by_peft_gives_equal_logits_here(options, tmp_path, ids):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(ids).logits)


def test_the_tensor_file_is_pefts_byte_for_byte(tmp_path):
    ours = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS[0]))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**OPTIONS[0]))
    randomise(ours)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        del config["target_modules"]  # ours lists the seven endings, PEFT's all 14 names
    assert configs[0] == configs[1]


def test_save_load_save_gives_the_same_bytes(saved, tmp_path):
    PeftModel.from_pretrained(tiny_llama(), saved).save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_loaded_adapter_is_frozen_unless_asked_for(saved):
    frozen = PeftModel.from_pretrained(tiny_llama(), saved)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    trainable = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "lora_" in n
    }


def drop_half(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def rename(tensors):
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop(sorted(tensors)[0])


def reshape(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:2].contiguous()


def poison(tensors):
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def round_off(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].to(torch.int64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_half, r"missing: .*lora_A(.|\n)*missing: .*\.lora_A"),
        (rename, r"missing: (.|\n)*unexpected: base_model.model.other.lora_A.weight"),
        (reshape, r"shape of .*: the file has \(2, \d+\), the model wants \(4, \d+\)"),
        (poison, "holds NaN or infinite values"),
        (round_off, "torch.int64 is not a floating-point type"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_the_model_left_alone(saved, damage, message):
    rewrite(saved, damage)
    base = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_llama().modules()]


def test_an_adapter_of_a_larger_base_is_refused(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(AdapterError, match="unexpected: .*layers.1"):
        PeftModel.from_pretrained(small, saved)


def test_a_pickled_adapter_is_never_read(saved):
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="adapter_model.bin is not read"):
        PeftModel.from_pretrained(tiny_llama(), saved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_or_garbled_file_is_an_error_in_one_sentence(saved, data):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, header - 1))
        broken = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    path.write_bytes(broken)
    with suppress(RankfoldError):  # any other exception fails the test
        PeftModel.from_pretrained(tiny_llama(), saved)
    path.write_bytes(whole)


def test_a_plain_network_survives_the_round_trip(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))

    x = torch.randn(4, 10)
    ours = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))
