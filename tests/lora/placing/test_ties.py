from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, RankfoldWarning, TargetError
from rankfold.lora.placing.ties import TiedHead

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
TARGETS = [
    ["q_proj", "embed_tokens"],
    ["lm_head", "q_proj"],
    ["embed_tokens", "lm_head"],
    r".*(q_proj|lm_head)",
]


def tiny(tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=20, num_attention_heads=2, vocab_size=30, num_hidden_layers=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def options(targets=("q_proj", "embed_tokens"), **more) -> dict:
    targets = targets if isinstance(targets, str) else list(targets)
    return {"r": 2, "lora_alpha": 3, "target_modules": targets, "ensure_weight_tying": True} | more


def ids() -> torch.Tensor:
    return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(3))


def adapted(**more) -> PeftModel:
    ours = get_peft_model(tiny(), LoraConfig(**options(**more))).eval()
    randomise(ours)
    return ours


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids()).logits


def files(*folders) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "adapter_model.safetensors") for folder in folders]


MARK = pytest.mark.peft(
    "`ensure_weight_tying` of targets",
    "same outputs and files; two copies are trained one by one, and merging adds the update twice",
    "one pair of factors; merged == unmerged",
)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@MARK
def test_tied_factors_saved_here_give_equal_logits_in_peft(targets, tmp_path):
    ours = adapted(targets=targets)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(ours), logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = files(tmp_path / "ours", tmp_path / "theirs")
    if targets == ["lm_head", "q_proj"]:  # PEFT adds the embedding by its whole name, and then overlooks it
        mine = {key: tensor for key, tensor in mine.items() if "base_layer" not in key}
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@MARK
def test_tied_factors_saved_by_peft_give_equal_logits_here(targets, tmp_path):
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**options(targets))).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and "lm_head" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    base = get_peft_model(tiny(), LoraConfig(**options(targets)))
    mine, told = (
        base.peft_config["default"].target_modules,
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert mine == told["target_modules"] or {*mine} <= {*told["target_modules"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@MARK
def test_a_merge_keeps_the_output_and_the_tie(dtype):
    base = tiny(dtype=dtype)
    ours = get_peft_model(base, LoraConfig(**options())).eval()
    randomise(ours)
    before, expected = base.lm_head.weight.detach().clone(), logits(ours)
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.5}
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours), expected, **limits)
    ours.unmerge_adapter()
    assert torch.equal(base.lm_head.weight, before)
    assert torch.equal(logits(ours), expected)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, **limits)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert type(plain.lm_head) is nn.Linear
    assert vars(plain.lm_head).keys() == vars(tiny().lm_head).keys()


def test_pefts_merge_adds_the_update_to_the_shared_weight_twice():
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**options())).eval()
    randomise(theirs)
    embedding = theirs.base_model.model.model.embed_tokens
    before, update = embedding.weight.detach().clone(), embedding.get_delta_weight("default")
    with pytest.warns(UserWarning, match="tied_target_modules"):
        theirs.merge_adapter()
    torch.testing.assert_close(embedding.weight - before, 2 * update)


def test_the_gradient_is_the_sum_over_both_uses():
    ours = adapted(targets=["embed_tokens"])
    embedding, head = ours.get_base_model().model.embed_tokens, ours.get_base_model().lm_head
    factors = embedding.factors("default")
    logits(ours).square().sum().backward()
    free = get_peft_model(
        tiny(), LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head"])
    ).eval()
    free_embedding, free_head = free.get_base_model().model.embed_tokens, free.get_base_model().lm_head
    with torch.no_grad():
        for mine, other in zip(free_embedding.factors("default"), factors, strict=True):
            mine.copy_(other)
        for mine, other in zip(free_head.factors("default"), head.factors("default"), strict=True):
            mine.copy_(other)
    logits(free).square().sum().backward()
    a, b = free_head.factors("default")
    whole = [f.grad + g.grad.T for f, g in zip(free_embedding.factors("default"), (b, a), strict=True)]
    for mine, expected in zip(factors, whole, strict=True):
        torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_tied_adapter_changes_nothing_and_unload_leaves_nothing():
    base = tiny()
    expected = logits(base)
    ours = get_peft_model(base, LoraConfig(**options()))
    assert isinstance(base.lm_head, TiedHead)
    assert torch.equal(logits(ours.eval()), expected)
    assert not [name for name in ours.state_dict() if "lm_head" in name and "lora" in name]
    assert type(ours.unload().lm_head) is nn.Linear


def test_several_tied_adapters_are_switched_deleted_and_disabled(tmp_path):
    ours = adapted()
    first = logits(ours)
    ours.save_pretrained(tmp_path)
    ours.add_adapter("second", LoraConfig(**options(r=3)))
    ours.set_adapter("second")
    assert torch.equal(logits(ours), logits(tiny()))
    ours.load_adapter(tmp_path, "third")
    ours.delete_adapter("second")
    ours.set_adapter("third")
    assert torch.equal(logits(ours), first)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(tiny()))


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.peft("`ensure_weight_tying` of token rows", "same, with a warning that nothing is tied", "same")
def test_tied_token_rows_go_both_ways(tmp_path):
    wanted = {
        "r": 2,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 5],
        "ensure_weight_tying": True,
    }
    ours = get_peft_model(tiny(), LoraConfig(**wanted)).eval()
    randomise(ours)
    rows = ours.get_base_model().model.embed_tokens.rows("default")
    rows.data.normal_()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    expected = logits(ours)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_without_it_a_tied_target_is_adapted_alone_and_untied_by_merging():
    ours = get_peft_model(tiny(), LoraConfig(**options(ensure_weight_tying=False))).eval()
    randomise(ours)
    expected = logits(ours)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_a_file_in_which_the_two_differ_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "rankfold.json").unlink()
    base = tiny()
    with pytest.raises(AdapterError, match=r"different factors for model\.embed_tokens and lm_head"):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "DoRA would give each another weight"),
        ({"rank_pattern": {"embed_tokens": 4}}, "different ranks or alphas"),
    ],
)
def test_ties_that_cannot_be_kept_are_refused(more, message):
    with pytest.raises(TargetError, match=message):
        get_peft_model(tiny(), LoraConfig(**options(**more)))


def test_layers_of_other_kinds_that_are_tied_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(TargetError, match="not those of a Linear and a Linear"):
        get_peft_model(net, LoraConfig(target_modules=["0"], ensure_weight_tying=True))


def test_one_layer_is_tied_for_all_adapters_or_for_none():
    ours = adapted()
    with pytest.raises(TargetError, match="tied for one adapter and not for another"):
        ours.add_adapter("free", LoraConfig(r=2, target_modules=["embed_tokens"]))
    free = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="lm_head is tied for one adapter and not for 'default'"):
        free.add_adapter("tied", LoraConfig(**options()))


def test_targets_that_are_not_tied_have_nothing_to_ensure():
    with pytest.warns(RankfoldWarning, match="no tied modules were found"):
        get_peft_model(tiny(tied=False), LoraConfig(**options()))
