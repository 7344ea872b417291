from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from rankfold.errors import AdapterError, ConfigError, MergeError, TargetError
from rankfold.lora.placing.replication import find_layers

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 30, "num_hidden_layers": 3}
RANGES = [[0, 2], [1, 3]]  # of three layers: 0 1 1 2
OPTIONS = {"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES}
OTHERS = {
    "bert": (lambda: BertModel(BertConfig(intermediate_size=20, **SMALL)), ["query"]),
    "falcon": (lambda: FalconModel(FalconConfig(**SMALL)), ["query_key_value"]),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=20, **SMALL)).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(3))


def adapted(**more) -> PeftModel:
    ours = get_peft_model(llama(), LoraConfig(**(OPTIONS | more))).eval()
    randomise(ours)
    return ours


@pytest.mark.peft("`layer_replication`", "same; merging it changes the outputs", "same; merging is refused")
def test_a_replicated_model_saved_here_has_pefts_keys_and_equal_logits_in_peft(tmp_path):
    ours = adapted()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(ids()).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    ours_file, theirs_file = (
        load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")
    )
    assert ours_file.keys() == theirs_file.keys()
    assert {key.split(".")[4] for key in ours_file} == {"0", "1", "2", "3"}


@pytest.mark.peft("`layer_replication`", "same; merging it changes the outputs", "same; merging is refused")
def test_a_replicated_model_saved_by_peft_gives_equal_logits_here(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**OPTIONS)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(ids()).logits)
    assert ours.generate(input_ids=ids(), max_new_tokens=4, do_sample=False).equal(
        theirs.generate(input_ids=ids(), max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_bert_and_falcon_are_replicated_as_in_peft(kind, tmp_path):
    make, targets = OTHERS[kind]
    torch.manual_seed(0)
    base = make().eval()
    options = {"r": 2, "target_modules": targets, "layer_replication": RANGES}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(ours(input_ids=ids())[0], theirs(input_ids=ids())[0])


def test_the_layers_share_their_weights_and_no_adapter():
    base = llama()
    count = sum(p.numel() for p in base.parameters())
    ours = get_peft_model(base, LoraConfig(**OPTIONS))
    first, second = (base.model.layers[n].self_attn.q_proj for n in (1, 2))
    assert first.weight is second.weight
    assert first.lora_A["default"].weight is not second.lora_A["default"].weight
    trained, total = ours.get_nb_trainable_parameters()
    assert total - trained == count


def test_unload_gives_the_model_its_own_layers_back():
    base = llama()
    layers, before = base.model.layers, base(ids()).logits
    get_peft_model(base, LoraConfig(**OPTIONS)).unload()
    assert base.model.layers is layers
    assert base.config.num_hidden_layers == 3
    assert torch.equal(base(ids()).logits, before)


def test_merging_shared_layers_is_refused():
    ours = adapted()
    before = ours(input_ids=ids()).logits
    with pytest.raises(MergeError, match=r"layers are replicated"):
        ours.merge_and_unload()
    assert torch.equal(ours(input_ids=ids()).logits, before)


def test_layers_of_several_kinds_keep_their_kinds():
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        intermediate_size=20,
        num_key_value_heads=2,
        layer_types=kinds,
        sliding_window=4,
        use_sliding_window=True,
        **SMALL,
    )
    base = Qwen2ForCausalLM(config).eval()
    ours = get_peft_model(base, LoraConfig(**OPTIONS))
    assert base.config.layer_types == [kinds[n] for n in (0, 1, 1, 2)]
    ours(input_ids=ids())
    ours.unload()
    assert base.config.layer_types == kinds


def test_a_second_adapter_joins_the_replicated_layers(tmp_path):
    ours = adapted()
    ours.save_pretrained(tmp_path)
    ours.add_adapter("second", LoraConfig(**OPTIONS))
    assert len(ours.get_base_model().model.layers) == 4
    ours.load_adapter(tmp_path, "third")
    ours.set_adapter("third")
    assert torch.equal(ours(input_ids=ids()).logits, adapted()(input_ids=ids()).logits)
    with pytest.raises(ConfigError, match=r"replicated as \[\[0, 2\], \[1, 3\]\] already"):
        ours.add_adapter("fourth", LoraConfig(**OPTIONS | {"layer_replication": [[0, 1]]}))
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="carries adapters already"):
        plain.add_adapter("second", LoraConfig(**OPTIONS))


def test_injecting_replicates_too():
    base = llama()
    inject_adapter_in_model(LoraConfig(**OPTIONS), base)
    assert len(base.model.layers) == 4


@pytest.mark.parametrize(
    ("base", "ranges", "message"),
    [
        (llama, [[0, 4]], r"has 3 layers, and \[\[0, 4\]\] goes beyond"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), [[0, 1]], "Sequential has no list of layers"),
    ],
)
def test_layers_that_are_not_there_are_refused(base, ranges, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base(), LoraConfig(target_modules=["q_proj"], layer_replication=ranges))


def test_a_failure_leaves_the_layers_as_they_were(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = llama()
    layers = base.model.layers
    with pytest.raises(TargetError, match="not found"):
        get_peft_model(base, LoraConfig(**OPTIONS | {"target_modules": ["nothing"]}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.model.layers is layers
    assert find_layers(base)[1] is base.model


@pytest.mark.filterwarnings("ignore:.*already merged")
def test_peft_merges_shared_layers_and_changes_the_outputs():
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**OPTIONS)).eval()
    randomise(theirs)
    before = theirs(input_ids=ids()).logits
    assert not torch.allclose(theirs.merge_and_unload()(input_ids=ids()).logits, before, rtol=1e-3, atol=1e-3)
