from __future__ import annotations

import copy
import json
from collections.abc import Callable

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from conftest import tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError, MergeError, RankfoldWarning, TargetError
from rankfold.lora.layers.saved import SavedModule, plain_copy

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(hidden_size=16, num_labels=3, **SIZES)).eval()


def tiny_scorer() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, num_key_value_heads=1, pad_token_id=0, num_labels=3, **SIZES)
    return LlamaForSequenceClassification(config).eval()


def headed() -> nn.Module:
    """A network whose head is a module of several parts, one of them with buffers."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    return nn.ModuleDict({"body": nn.Linear(4, 8), "head": head})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = headed()
        self.body, self.head = parts["body"], parts["head"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


CLASSIFIERS: list[tuple[Callable[[], nn.Module], dict]] = [
    (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    (tiny_scorer, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (tiny_bert, {"target_modules": ["value"], "modules_to_save": ["pooler", "attention.output.LayerNorm"]}),
    (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
]
NAMES = ["bert", "llama", "several", "embeddings"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))


def train_by_chance(model: nn.Module, seed: int = 1) -> None:
    """Move every trained parameter, copies of modules too, by random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def scored(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(seed: int = 1) -> PeftModel:
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    train_by_chance(model, seed)
    return model


@pytest.mark.parametrize(("make", "options"), CLASSIFIERS, ids=NAMES)
@pytest.mark.peft("`modules_to_save`", "same", "same")
def test_what_is_saved_here_gives_equal_logits_in_peft(make, options, tmp_path, ids):
    ours = get_peft_model(make(), LoraConfig(r=2, **options)).eval()
    train_by_chance(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(scored(theirs, ids), scored(ours, ids))
    assert not torch.allclose(scored(make(), ids), scored(ours, ids))


@pytest.mark.parametrize(("make", "options"), CLASSIFIERS, ids=NAMES)
def test_what_peft_saved_gives_equal_logits_here(make, options, tmp_path, ids):
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **options)).eval()
    train_by_chance(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(scored(ours, ids), scored(theirs, ids))


@pytest.mark.parametrize(("make", "options"), CLASSIFIERS, ids=NAMES)
def test_the_file_has_pefts_keys_and_shapes_and_the_config_pefts_modules(make, options, tmp_path):
    get_peft_model(make(), LoraConfig(r=2, **options)).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(make(), peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: t.shape for k, t in files[0].items()} == {k: t.shape for k, t in files[1].items()}
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0]["modules_to_save"] == configs[1]["modules_to_save"]


def test_saving_loading_and_saving_gives_the_same_bytes(tmp_path):
    adapted().save_pretrained(tmp_path / "one")
    PeftModel.from_pretrained(tiny_bert(), tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_head_with_parts_and_buffers_survives_the_round_trip_both_ways(tmp_path):
    x = torch.randn(16, 4)
    options = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}
    ours = get_peft_model(Net(), LoraConfig(**options))
    train_by_chance(ours)
    ours.train()(x)  # moves the running statistics of the copy
    ours.eval().save_pretrained(tmp_path / "ours")
    for loader in (peft.PeftModel, PeftModel):
        loaded = loader.from_pretrained(Net(), tmp_path / "ours").eval()
        torch.testing.assert_close(loaded(x), ours(x))
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**options))
    theirs.train()(x)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "theirs")(x), theirs(x))
    assert torch.equal(ours.get_base_model().head[1].running_mean, torch.zeros(6))


def test_the_first_output_is_the_base_to_the_last_bit(ids):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert torch.equal(scored(model.eval(), ids), scored(tiny_bert(), ids))


def test_only_factors_and_the_copy_are_trained_and_only_they_get_gradients(ids):
    model = adapted()
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in trained if "lora_" not in n} == {
        f"base_model.model.classifier.modules_to_save.default.{key}" for key in ("weight", "bias")
    }


def test_base_keys_and_values_are_kept_and_the_type_too():
    base = tiny_bert()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    train_by_chance(model)
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert isinstance(base.classifier, nn.Linear)
    assert type(base.classifier.modules_to_save["default"]) is nn.Linear
    assert model.modules_to_save == {"classifier", "score"}


def test_disabled_the_model_is_the_base_to_the_last_bit(ids):
    model = adapted()
    trained = scored(model, ids)
    with model.disable_adapter():
        assert torch.equal(scored(model, ids), scored(tiny_bert(), ids))
    assert torch.equal(scored(model, ids), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_output_and_unmerging_gives_the_bits_back(dtype, ids):
    base = tiny_bert().to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    train_by_chance(model)
    expected = scored(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(scored(model, ids), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(base.classifier.weight, base.classifier.modules_to_save["default"].weight)
    model.unmerge_adapter()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(scored(model, ids), expected)


def test_merge_and_unload_leaves_the_trained_copy_in_a_plain_model_as_peft_does(tmp_path, ids):
    model = adapted()
    expected = scored(model, ids)
    model.save_pretrained(tmp_path)
    plain = model.merge_and_unload()
    torch.testing.assert_close(scored(plain, ids), expected)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload()
    torch.testing.assert_close(plain.state_dict(), theirs.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny_bert().modules()]


class Projector(nn.Module):
    """A module of two parts with a forward of its own, as projectors of images are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def projecting() -> Net:
    net = Net()
    net.head = Projector()
    return net.eval()


def test_a_module_of_several_parts_is_merged_with_all_of_them():
    base = projecting()
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])).eval()
    train_by_chance(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)
    assert [type(module) for module in plain.modules()] == [type(module) for module in projecting().modules()]


def test_a_sequential_module_works_disabled_and_merged_as_in_peft(tmp_path):
    options = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"], "init_lora_weights": False}
    ours = get_peft_model(Net(), LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in ours.base_model.model.head.modules_to_save["default"].parameters():
            parameter.add_(torch.randn_like(parameter))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x), Net().eval()(x), rtol=0, atol=0)
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs(x))


def test_a_sequential_module_counts_and_hands_out_its_own_parts():
    act = nn.ReLU()  # one object in two places
    net = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 2), act)}
    )
    plain = copy.deepcopy(net["head"])
    head = get_peft_model(
        net, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    ).base_model.model["head"]
    assert isinstance(head, SavedModule)
    assert len(head) == len(list(head)) == 4
    assert [type(part) for part in head] == [type(part) for part in plain]
    assert head[-1] is head[1] is next(iter(head[1:]))
    assert type(head[:2]) is nn.Sequential
    assert [*head[:2]] == [head[0], head[1]]


def test_unloading_gives_the_plain_base_back(ids):
    model = adapted()
    model.merge_adapter()
    base = model.unload()
    assert torch.equal(scored(base, ids), scored(tiny_bert(), ids))
    assert type(base.classifier) is nn.Linear
    assert vars(base.classifier).keys() == vars(tiny_bert().classifier).keys()


def test_each_adapter_has_its_own_copy_and_deleting_one_leaves_the_other(ids):
    model = adapted()
    first = scored(model, ids)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert torch.equal(scored(model, ids), first)
    model.set_adapter("second")
    assert torch.equal(scored(model, ids), scored(tiny_bert(), ids))  # fresh: the base, not the first copy
    train_by_chance(model, seed=5)
    second = scored(model, ids)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(scored(model, ids), first)
    model.delete_adapter("default")
    assert torch.equal(scored(model, ids), second)
    assert list(model.classifier.modules_to_save) == ["second"]


def test_an_adapter_without_copies_uses_the_base_module(ids):
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("plain")
    assert torch.equal(scored(model, ids), scored(tiny_bert(), ids))


def test_two_copies_of_one_module_cannot_be_active_or_merged_at_a_time():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match=r"same time:\n  - classifier: .*each of .* has its own copy"):
        model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    with pytest.raises(MergeError, match="classifier: .*each of"):
        model.merge_adapter(["default", "second"])
    assert not model.classifier.merged


def test_a_copy_with_nan_is_not_merged():
    model = adapted()
    with torch.no_grad():
        model.classifier.modules_to_save["default"].bias[0] = float("nan")
    with pytest.raises(MergeError, match="classifier: the trained copy holds NaN or infinite values: bias"):
        model.merge_adapter()


def test_hooks_run_once_whichever_copy_is_used(ids):
    base, calls = tiny_bert(), []
    base.classifier.register_forward_hook(lambda *_: calls.append(1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    scored(model, ids)
    assert calls == [1]


def test_a_copy_made_while_another_is_merged_starts_from_the_base():
    model = adapted()
    base = model.get_base_model().classifier
    before = tiny_bert().classifier.weight
    model.merge_adapter()
    assert not torch.equal(base.weight, before)
    assert torch.equal(plain_copy(base).weight, before)


def test_the_parts_of_a_saved_module_are_no_targets():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules="all-linear", modules_to_save=["head"]))
    assert model.targeted_module_names == ["body"]
    assert type(model.get_base_model().head.modules_to_save["default"][0]) is nn.Linear


def test_the_users_config_is_not_changed():
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(tiny_bert(), config)
    assert config.modules_to_save is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["pooler.dense"], "modules_to_save": ["layer"]},
            r"layer is a ModuleList, which is never called",
        ),
        ({"modules_to_save": ["dropout"]}, "dropout .* has no floating-point parameter to train"),
        (
            {"target_modules": ["classifier"], "modules_to_save": ["classifier"]},
            "No modules were targeted for adaptation",
        ),
    ],
)
def test_modules_that_cannot_be_saved_are_refused_and_nothing_is_changed(options, message):
    base = tiny_bert()
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, LoraConfig(**{"target_modules": ["query"], **options}))
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_bert().modules()]


def test_a_module_is_not_trained_in_two_ways():
    model = adapted()
    with pytest.raises(TargetError, match="classifier is a target, and another adapter trains it"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(TargetError, match=r"self.query carries another kind of adapter already"):
        model.add_adapter("other", LoraConfig(target_modules=["value"], modules_to_save=["query"]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("value", ["score", [1], [""]])
def test_modules_to_save_must_be_a_list_of_names(value):
    with pytest.raises(ConfigError, match="modules_to_save must be a list of names, got"):
        LoraConfig(modules_to_save=value)


def test_a_file_without_the_copy_is_refused(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["classifier"]}))
    (tmp_path / "rankfold.json").unlink()
    base = tiny_bert()
    with pytest.raises(AdapterError, match=r"missing: base_model.model.classifier.bias"):
        PeftModel.from_pretrained(base, tmp_path, allow=())
    assert not any(isinstance(m, SavedModule) for m in base.modules())


def test_a_copy_of_a_tied_head_is_told_of_and_not_merged_into_the_embedding(ids):
    base = tiny_llama(tied=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        model = get_peft_model(base, config).eval()
    train_by_chance(model)
    trained = scored(model, ids)
    before = base.model.embed_tokens.weight.detach().clone()
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(scored(merged, ids), trained)
    assert torch.equal(base.model.embed_tokens.weight, before)
    assert base.lm_head.weight is not base.model.embed_tokens.weight


@pytest.mark.parametrize("entry", ["lm_head", "embed_tokens"])
@pytest.mark.peft("`ensure_weight_tying` of saved modules", "same", "same")
def test_ensured_ties_hold_in_training_in_pefts_file_and_through_a_merge(entry, tmp_path, ids):
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": [entry], "ensure_weight_tying": True}
    base = tiny_llama(tied=True)
    model = get_peft_model(base, LoraConfig(**options)).eval()
    train_by_chance(model)
    copies = [m.modules_to_save["default"] for m in (base.model.embed_tokens, base.lm_head)]
    assert copies[0].weight is copies[1].weight
    expected, before = scored(model, ids), base.lm_head.weight.detach().clone()
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "ours").eval()
    torch.testing.assert_close(scored(theirs, ids), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    ours = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "theirs")
    torch.testing.assert_close(scored(ours, ids), expected)
    model.merge_adapter()
    torch.testing.assert_close(scored(model, ids), expected)
    model.unmerge_adapter()
    assert torch.equal(base.lm_head.weight, before)
    plain = model.merge_and_unload()
    torch.testing.assert_close(scored(plain, ids), expected)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert vars(plain.lm_head).keys() == vars(tiny_llama().lm_head).keys()


def test_a_tie_for_one_adapter_and_not_for_another_is_refused():
    base = tiny_llama(tied=True)
    tied = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(base, tied)
    with pytest.raises(TargetError, match="lm_head is tied for one adapter and not for another"):
        model.add_adapter("free", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_a_tie_that_is_not_there_cannot_be_ensured():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.warns(RankfoldWarning, match="no tied modules were found"):
        get_peft_model(tiny_llama(tied=False), config)
