from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError, MergeError, RankfoldWarning
from rankfold.lora.layers.registry import HELD

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


def tiny_bert(kind: type = BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    model = kind(BertConfig(hidden_size=16, **SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tiny_llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))


def train_by_chance(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def biased(bias: str = "all", seed: int = 1, **options) -> PeftModel:
    model = get_peft_model(
        tiny_bert(), LoraConfig(r=2, target_modules=["query"], bias=bias, **options)
    ).eval()
    train_by_chance(model, seed)
    return model


def keys(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


# Biases


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForMaskedLM])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.peft('`bias="all"` and `"lora_only"`', "same", "same")
def test_biases_saved_here_give_equal_logits_in_peft_and_back(kind, bias, tmp_path, ids):
    options = {"r": 2, "target_modules": ["query", "intermediate.dense"], "bias": bias}
    ours = get_peft_model(tiny_bert(kind), LoraConfig(**options)).eval()
    train_by_chance(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_bert(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids))
    assert not torch.allclose(logits(tiny_bert(kind), ids), logits(ours, ids))
    theirs = peft.get_peft_model(tiny_bert(kind), peft.LoraConfig(**options)).eval()
    train_by_chance(theirs, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_bert(kind), tmp_path / "theirs")
    torch.testing.assert_close(logits(again, ids), logits(theirs, ids))
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")


def test_the_bias_of_a_saved_module_is_written_once_and_read_from_pefts_three(tmp_path, ids):
    options = {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(**options)).eval()
    train_by_chance(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny_bert(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids))
    ours.save_pretrained(tmp_path / "ours")
    repeated = {f"base_model.model.classifier.{n}.bias" for n in ("original_module", "modules_to_save")}
    assert keys(tmp_path / "theirs") - keys(tmp_path / "ours") == repeated
    again = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids), logits(ours, ids))


def test_the_same_parameters_are_trained_as_in_peft_and_base_keys_stay():
    for bias in ("all", "lora_only"):
        theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"], bias=bias))
        ours = biased(bias)
        trained = {n.replace("base_layer.", "") for n, p in theirs.named_parameters() if p.requires_grad}
        assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained
        base = list(tiny_bert().state_dict())
        assert [k for k in ours.get_base_model().state_dict() if "lora_" not in k] == base


def test_a_first_output_is_the_base_to_the_last_bit(ids):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], bias="all")).eval()
    assert torch.equal(logits(model, ids), logits(tiny_bert(), ids))


def test_biases_get_gradients_and_an_optimiser_keeps_hold_of_them(ids):
    model = biased()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    with model.disable_adapter():
        model(input_ids=ids)
    before = logits(model, ids)
    assert model.classifier.bias.grad is not None
    optimiser.step()
    assert not torch.allclose(logits(model, ids), before)


@pytest.mark.peft(
    "`disable_adapter()` with trained biases", "keeps the trained biases", "the base's own biases are back"
)
def test_disabled_the_bases_own_biases_are_back_where_peft_keeps_the_trained_ones(ids):
    model = biased()
    trained = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_bert(), ids))
    assert torch.equal(logits(model, ids), trained)
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"], bias="all"))
    train_by_chance(theirs.eval())
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), theirs.disable_adapter():
        assert not torch.allclose(logits(theirs, ids), logits(tiny_bert(), ids))


@pytest.mark.parametrize("merged", [False, True])
def test_unloading_gives_the_bases_own_biases_back_in_their_own_objects(merged, ids):
    base = tiny_bert()
    parameters = dict(base.named_parameters())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], bias="all")).eval()
    train_by_chance(model)
    if merged:
        model.merge_adapter()
    model.unload()
    assert torch.equal(logits(base, ids), logits(tiny_bert(), ids))
    assert all(base.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert vars(base).keys() == vars(tiny_bert()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_trained_biases_and_unmerging_the_way_back(dtype, ids):
    base = tiny_bert().to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], bias="all")).eval()
    train_by_chance(model)
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, rtol=2e-2, atol=2e-2)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        state = base.state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items())
    parameters = dict(base.named_parameters())
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(plain.classifier.bias, before["classifier.bias"])
    assert plain.classifier.bias is not parameters["classifier.bias"]
    assert HELD not in vars(plain)


def test_merging_an_adapter_with_biases_that_is_not_active_and_back(ids):
    model = biased()
    trained = logits(model, ids)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("plain")
    train_by_chance(model, seed=4)
    plain = logits(model, ids)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model, ids), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), plain)


def test_biases_go_with_their_adapter_when_it_is_switched_or_deleted(ids):
    model = biased()
    trained = logits(model, ids)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("plain")
    assert torch.equal(logits(model, ids), logits(tiny_bert(), ids))
    assert not model.classifier.bias.requires_grad
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), trained)
    assert model.classifier.bias.requires_grad
    model.delete_adapter("default")
    assert torch.equal(logits(model, ids), logits(tiny_bert(), ids))


def test_only_one_adapter_may_train_biases():
    model = biased()
    with pytest.raises(
        ConfigError, match="supports only 1 adapter with bias.*'default' trains biases already"
    ):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["query"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]
    assert "second" not in model.bert.encoder.layer[0].attention.self.query.lora_A


def test_the_hidden_biases_follow_the_model_to_another_dtype(ids):
    model = biased()
    expected = logits(biased().double(), ids)
    with model.disable_adapter():
        model.double()
    assert torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        assert model.classifier.bias.dtype == torch.float64


def test_a_copy_of_the_model_swaps_its_own_biases(ids):
    model = biased()
    twin = copy.deepcopy(model)
    train_by_chance(twin, seed=8)
    before = logits(model, ids)
    with twin.disable_adapter():
        assert torch.equal(logits(twin, ids), logits(tiny_bert(), ids))
        assert torch.equal(logits(model, ids), before)


def test_a_bias_that_is_not_finite_is_not_merged():
    model = biased()
    with torch.no_grad():
        model.classifier.bias[0] = float("inf")
    with pytest.raises(MergeError, match="NaN or infinite values in classifier.bias"):
        model.merge_adapter()


def test_biases_that_are_not_there_are_told_of_on_creation_and_not_on_loading(tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "bias": "all"}
    with pytest.warns(RankfoldWarning, match="bias='all' trains biases, and there is none to train"):
        get_peft_model(tiny_llama(), LoraConfig(**options))
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path).peft_config["default"].bias == "all"


def test_a_failed_load_leaves_the_bases_biases(tmp_path, ids):
    biased().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.classifier.bias")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rankfold.json").unlink()
    base = tiny_bert()
    with pytest.raises(AdapterError, match=r"missing: base_model.model.classifier.bias"):
        PeftModel.from_pretrained(base, tmp_path, allow=())
    assert torch.equal(logits(base, ids), logits(tiny_bert(), ids))
    assert HELD not in vars(base)


@pytest.mark.parametrize("bias", ["ALL", None, "boft_only"])
def test_bias_must_be_one_of_its_three_words(bias):
    with pytest.raises(ConfigError, match="bias must be one of 'none', 'all', 'lora_only', got"):
        LoraConfig(bias=bias)


# Saved embeddings


def changed_embeddings(tied: bool) -> nn.Module:
    """The tiny Llama after somebody has trained its embeddings."""
    model = tiny_llama(tied=tied)
    with torch.no_grad():
        for layer in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            layer.mul_(1.5)
    return model


def with_embeddings(tied: bool, **options) -> PeftModel:
    config = LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})
    model = get_peft_model(changed_embeddings(tied), config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.peft("`save_embedding_layers`", "asks the hub", "same files, no call to the hub")
def test_embeddings_saved_here_on_request_are_pefts_and_load_in_both(tied, tmp_path, ids):
    ours = with_embeddings(tied)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tied=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs") >= {f"{EMBED}.weight", f"{HEAD}.weight"}
    base = tiny_llama(tied=tied)
    again = PeftModel.from_pretrained(base, tmp_path / "theirs")
    torch.testing.assert_close(logits(again, ids), logits(ours, ids))
    assert not any(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "ours")
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_embeddings_leave_with_their_adapter(tied, tmp_path, ids):
    ours = with_embeddings(tied)
    ours.save_pretrained(tmp_path, save_embedding_layers=True)
    base = tiny_llama(tied=tied)
    own = dict(base.named_parameters())
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert not model.get_input_embeddings().weight.requires_grad
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_llama(tied=tied), ids))
    torch.testing.assert_close(logits(model, ids), logits(ours, ids))
    model.unload()
    assert torch.equal(logits(base, ids), logits(tiny_llama(tied=tied), ids))
    assert all(base.get_parameter(name) is parameter for name, parameter in own.items())


def test_merging_for_good_leaves_the_loaded_embeddings(tmp_path, ids):
    ours = with_embeddings(True)
    ours.save_pretrained(tmp_path, save_embedding_layers=True)
    plain = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), logits(ours, ids))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_targeted_embedding_is_saved_by_itself_with_pefts_key_and_loads_in_either_spelling(tmp_path, ids):
    targets = ["q_proj", "embed_tokens"]
    ours = with_embeddings(False, target_modules=targets)
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=targets)).save_pretrained(
            tmp_path / "theirs"
        )
    assert keys(tmp_path) == keys(tmp_path / "theirs")
    assert f"{EMBED}.base_layer.weight" in keys(tmp_path)
    theirs = peft.PeftModel.from_pretrained(changed_embeddings(False), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids))
    expected = ours.get_input_embeddings()(ids)
    for spelling in ("base_layer.weight", "weight"):
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors[f"{EMBED}.{spelling}"] = tensors.pop(f"{EMBED}.base_layer.weight")
        (tmp_path / spelling).mkdir()
        save_file(tensors, tmp_path / spelling / "adapter_model.safetensors", metadata={"format": "pt"})
        config = (tmp_path / "adapter_config.json").read_bytes()
        (tmp_path / spelling / "adapter_config.json").write_bytes(config)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / spelling)
        torch.testing.assert_close(loaded.get_input_embeddings()(ids), expected)


def test_a_merged_embedding_is_saved_as_it_is_unmerged(tmp_path):
    model = with_embeddings(False, target_modules=["q_proj", "embed_tokens"])
    before = model.get_input_embeddings().weight.detach().clone()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")[f"{EMBED}.base_layer.weight"]
    assert torch.equal(saved, before)


def test_embeddings_are_left_out_otherwise_and_if_told_so(tmp_path):
    with_embeddings(False).save_pretrained(tmp_path / "plain")
    targeted = with_embeddings(False, target_modules=["embed_tokens"])
    targeted.save_pretrained(tmp_path / "told", save_embedding_layers=False)
    rows = with_embeddings(False, trainable_token_indices=[1])
    rows.save_pretrained(tmp_path / "rows")
    for folder in ("plain", "told", "rows"):
        assert not any(
            key.endswith(("tokens.weight", "base_layer.weight")) for key in keys(tmp_path / folder)
        )


@pytest.mark.parametrize(("recorded", "saved"), [(64, False), (100, True)])
def test_a_vocabulary_that_the_base_folder_does_not_know_is_saved_without_asking_the_hub(
    recorded, saved, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": recorded}))
    model = with_embeddings(False, base_model_name_or_path=str(tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    assert ({f"{EMBED}.weight", f"{HEAD}.weight"} <= keys(tmp_path / "adapter")) is saved


def test_equal_embeddings_in_a_file_take_no_memory(tmp_path):
    with_embeddings(False).save_pretrained(tmp_path, save_embedding_layers=True)
    base = changed_embeddings(False)
    PeftModel.from_pretrained(base, tmp_path)
    assert HELD not in vars(base)


def edited(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "rankfold.json").unlink()


def untie(tensors: dict) -> None:
    tensors[f"{HEAD}.weight"] = tensors[f"{HEAD}.weight"] + 1


def shorten(tensors: dict) -> None:
    tensors[f"{EMBED}.weight"] = tensors[f"{EMBED}.weight"][:9].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (untie, "different values for model.embed_tokens.weight and lm_head.weight, which the model ties"),
        (
            shorten,
            r"size mismatch for .*embed_tokens.weight: the file has \(9, 32\), the model wants \(64, 32\)",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_and_the_base_left_alone(change, message, tmp_path, ids):
    with_embeddings(True).save_pretrained(tmp_path, save_embedding_layers=True)
    edited(tmp_path, change)
    base = tiny_llama(tied=True)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, tmp_path, allow=())
    assert torch.equal(logits(base, ids), logits(tiny_llama(tied=True), ids))
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_llama().modules()]


def test_two_adapters_with_embeddings_of_their_own_are_not_active_together(tmp_path):
    with_embeddings(True).save_pretrained(tmp_path, save_embedding_layers=True)
    model = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path)
    model.load_adapter(tmp_path, "second")
    with pytest.raises(ConfigError, match="'default' and 'second' each bring their own model.embed_tokens"):
        model.set_adapter(["default", "second"])


def test_saving_embeddings_takes_true_false_or_auto(tmp_path):
    model = with_embeddings(False)
    with pytest.raises(ConfigError, match="save_embedding_layers must be True, False or \"auto\", got 'yes'"):
        model.save_pretrained(tmp_path, save_embedding_layers="yes")
    net = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(RankfoldWarning, match="Could not identify embedding layer"):
        net.save_pretrained(tmp_path, save_embedding_layers=True)


def test_what_pissa_left_of_a_targeted_head_goes_through_files_and_the_base_stays(tmp_path, ids):
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).eval()
    train_by_chance(theirs)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path / "theirs")
    edited_file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(edited_file)
    tensors[f"{HEAD}.base_layer.weight"] += 1e-3  # as another machine's decomposition might
    save_file(tensors, edited_file, metadata={"format": "pt"})
    expected = logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs"), ids)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids), expected)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, ids), logits(tiny_llama(), ids))
        ours.save_pretrained(tmp_path / "disabled")
    ours.merge_adapter()
    ours.save_pretrained(tmp_path / "merged")
    ours.unmerge_adapter()
    ours.save_pretrained(tmp_path / "ours")
    files = [tmp_path / way / "adapter_model.safetensors" for way in ("ours", "disabled", "merged", "theirs")]
    assert len({file.read_bytes() for file in files}) == 1
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, ids), expected)
    assert torch.equal(logits(ours.unload(), ids), logits(tiny_llama(), ids))
