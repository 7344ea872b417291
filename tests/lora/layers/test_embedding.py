from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError
from rankfold.lora.layers.embedding import LoraEmbedding
from rankfold.lora.layers.registry import LORA_CLASSES, register_layer
from rankfold.lora.placing.placement import remove

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": ["emb"]}
IDS = torch.tensor([[0, 3, 3, 7], [11, 2, 0, 5]])


class Net(nn.Module):
    def __init__(self, emb: nn.Embedding | None = None, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(12, 10, **options) if emb is None else emb
        self.head = nn.Linear(10, 3)

    def forward(self, ids):
        return self.head(self.emb(ids))


def gemma_embedding(dtype=torch.float32) -> nn.Embedding:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    emb = Gemma3TextScaledWordEmbedding(12, 10, padding_idx=0, embed_scale=10**0.5)
    emb.weight.data = emb.weight.data.to(dtype)  # the scale stays float32 and is rounded in each call
    return emb


def bart_embedding(dtype=torch.float32) -> nn.Embedding:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    torch.manual_seed(0)
    return BartScaledWordEmbedding(12, 10, padding_idx=0, embed_scale=10**0.5).to(dtype)


def ours(net: nn.Module, **options) -> PeftModel:
    model = get_peft_model(net, LoraConfig(**OPTIONS | options))
    randomise(model)
    return model


def pair(build, **options) -> tuple[PeftModel, nn.Module]:
    """The same network with the same random adapter, here and in PEFT."""
    mine = ours(build(), **options)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**OPTIONS | options))
    source = {key: value for key, value in mine.state_dict().items() if "lora_" in key}
    assert not theirs.load_state_dict(source, strict=False).unexpected_keys
    return mine, theirs


def test_the_output_is_the_dense_formula():
    net = Net().double()
    weight = net.emb.weight.detach().clone()
    model = ours(net)
    lora_a, lora_b = net.emb.factors("default")
    assert (tuple(lora_a.shape), tuple(lora_b.shape)) == ((4, 12), (10, 4))
    torch.testing.assert_close(model(IDS), net.head((weight + 2 * (lora_b @ lora_a).T)[IDS]))


def test_keys_are_added_and_none_renamed():
    net = Net()
    before = list(net.emb.state_dict())
    ours(net)
    assert list(net.emb.state_dict()) == [*before, "lora_embedding_A.default", "lora_embedding_B.default"]
    assert net.emb.lora_embedding_A["default"] is net.emb.factors("default")[0]
    assert (len(net.emb.lora_A), net.emb.in_features, net.emb.out_features) == (0, 12, 10)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_one_seed_gives_the_same_start_as_peft(init):
    mine, theirs = Net(), Net()
    torch.manual_seed(7)
    get_peft_model(mine, LoraConfig(**OPTIONS, init_lora_weights=init))
    torch.manual_seed(7)
    peft.get_peft_model(theirs, peft.LoraConfig(**OPTIONS, init_lora_weights=init))
    for factor, parameter in zip(("A", "B"), mine.emb.factors("default"), strict=True):
        assert torch.equal(parameter, getattr(theirs.emb, f"lora_embedding_{factor}")["default"])


def test_the_start_is_the_base_to_the_last_bit():
    net = Net()
    expected = net(IDS)
    assert torch.equal(get_peft_model(net, LoraConfig(**OPTIONS))(IDS), expected)


VARIETIES = [
    {},
    {"padding_idx": 0},
    {"max_norm": 0.7},
    {"max_norm": 0.7, "norm_type": 1.0},
    {"scale_grad_by_freq": True, "padding_idx": 3},
]


@pytest.mark.parametrize("variety", VARIETIES, ids=str)
def test_output_and_gradients_are_pefts(variety):
    mine, theirs = pair(lambda: Net(**variety))
    outputs = [model(IDS) for model in (mine, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    expected = {n: p.grad.to_dense() for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad.to_dense() for n, p in mine.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.peft("`nn.Embedding(sparse=True)`", "fails in backward", "is trained")
def test_a_sparse_embedding_is_trained_where_peft_fails():
    mine, theirs = pair(lambda: Net(sparse=True))
    with pytest.raises(RuntimeError, match="transpositions between sparse and dense dimensions"):
        theirs(IDS).square().sum().backward()
    dense = ours(Net())
    for model in (mine, dense):
        model(IDS).square().sum().backward()
    for found, expected in zip(mine.emb.factors("default"), dense.emb.factors("default"), strict=True):
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("build", [Net, lambda: Net(gemma_embedding()), lambda: Net(bart_embedding())])
@pytest.mark.peft("`nn.Embedding`", "same", "same")
def test_files_pass_between_peft_and_rankfold(build, tmp_path):
    mine = ours(build())
    mine.save_pretrained(tmp_path / "ours")
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "ours/adapter_model.safetensors").items()} == {
        "base_model.model.emb.lora_embedding_A": (4, 12),
        "base_model.model.emb.lora_embedding_B": (10, 4),
    }
    torch.testing.assert_close(peft.PeftModel.from_pretrained(build(), tmp_path / "ours")(IDS), mine(IDS))
    assert not torch.allclose(build()(IDS), mine(IDS))
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**OPTIONS))
    randomise(theirs, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(PeftModel.from_pretrained(build(), tmp_path / "theirs")(IDS), theirs(IDS))


@pytest.mark.parametrize("target", [["embed_tokens"], ["embed_tokens", "q_proj"]])
@pytest.mark.peft("`nn.Embedding`", "same", "same")
def test_a_language_models_embedding_passes_between_peft_and_rankfold(target, tmp_path):
    options = {"r": 4, "target_modules": target, "task_type": "CAUSAL_LM"}
    ids = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))
    mine = get_peft_model(tiny_llama(), LoraConfig(**options)).eval()
    randomise(mine)
    mine.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, mine(ids).logits)
    assert not torch.allclose(tiny_llama()(ids).logits, mine(ids).logits)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(again(ids).logits, mine(ids).logits)
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gemma_embedding, bart_embedding])
def test_embed_scale_multiplies_the_update_as_it_does_the_weight(build, dtype):
    emb = build(dtype)
    plain, scale = copy.deepcopy(emb), getattr(emb, "embed_scale")  # noqa: B009
    rounded = float(scale.to(dtype) if isinstance(scale, torch.Tensor) else scale)
    net = Net(emb)
    ours(net)
    lora_a, lora_b = emb.factors("default")
    update = 2 * rounded * (lora_b @ lora_a).T[IDS]
    torch.testing.assert_close(emb(IDS), (plain(IDS) + update).to(dtype))
    assert emb(IDS).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [Net, lambda: Net(gemma_embedding()), lambda: Net(padding_idx=0)])
def test_merging_keeps_the_output_and_unmerging_gives_back_the_bits(build, dtype):
    net = build().to(dtype)
    before = net.emb.weight.detach().clone()
    model = ours(net)
    expected = model(IDS)
    model.merge_adapter()
    assert not torch.equal(net.emb.weight, before)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(model(IDS), expected, **tolerance)
    model.unmerge_adapter()
    assert torch.equal(net.emb.weight, before)
    assert torch.equal(model(IDS), expected)


def test_a_weight_with_a_limited_norm_is_not_merged():
    model = ours(Net(max_norm=0.7))
    with pytest.raises(MergeError, match=r"emb: max_norm limits the norm .* one by one"):
        model.merge_adapter()


def test_a_weight_tied_to_the_head_is_untied_by_merging():
    model = get_peft_model(tiny_llama(tied=True), LoraConfig(r=2, target_modules=["embed_tokens"])).eval()
    randomise(model)
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert merged.get_input_embeddings().weight is not merged.lm_head.weight
    assert merged.config.tie_word_embeddings is False


def test_restoring_gives_back_a_plain_embedding():
    net = Net()
    plain = vars(nn.Embedding(12, 10)).keys()
    remove(ours(net).get_base_model())
    assert type(net.emb) is nn.Embedding
    assert vars(net.emb).keys() == plain
    assert list(net.emb.state_dict()) == ["weight"]
    assert torch.equal(net.emb.weight, Net().emb.weight)


def test_adapters_are_added_disabled_switched_and_deleted():
    net = Net()
    base = net(IDS)
    model = ours(net)
    model.add_adapter("copy_2", LoraConfig(**OPTIONS | {"r": 2}))
    randomise(model)
    first = model(IDS)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base)
    torch.testing.assert_close(model(IDS), first)
    model.set_adapter("copy_2")
    assert not torch.allclose(model(IDS), first)
    model.delete_adapter("copy_2")
    torch.testing.assert_close(model(IDS), first)
    assert list(net.emb.lora_embedding_A.keys()) == ["default"]
    assert list(net.emb.state_dict()) == ["weight", "lora_embedding_A.default", "lora_embedding_B.default"]


def test_a_copy_is_independent():
    net = Net()
    ours(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.emb.factors("default")[1].zero_()
    assert net.emb.factors("default")[1].abs().sum() > 0
    assert type(twin.emb) is LoraEmbedding


def test_a_half_precision_base_gets_float32_factors_and_keeps_its_output_dtype():
    net = Net().bfloat16()
    ours(net)
    assert net.emb.factors("default")[0].dtype == torch.float32
    assert net.emb(IDS).dtype == torch.bfloat16


def test_a_bias_is_refused_and_the_model_left_alone():
    net = Net()
    with pytest.raises(ConfigError, match="emb: lora_bias=True is not supported for Embedding"):
        get_peft_model(net, LoraConfig(**OPTIONS, lora_bias=True))
    assert type(net.emb) is nn.Embedding


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


def test_a_subclass_with_a_forward_of_its_own_is_refused_until_it_is_registered():
    with pytest.raises(
        ConfigError, match=r"emb: a Normed has a forward of its own; .*register_layer\(Normed"
    ):
        get_peft_model(Net(Normed(12, 10)), LoraConfig(**OPTIONS))
    register_layer(Normed, LoraEmbedding)
    try:
        net = Net(Normed(12, 10))
        ours(net)
    finally:
        del LORA_CLASSES[Normed]
    lora_a, lora_b = net.emb.factors("default")
    expected = nn.functional.normalize(net.emb.weight[IDS], dim=-1) + 2 * (lora_b @ lora_a).T[IDS]
    torch.testing.assert_close(net.emb(IDS), expected)


def test_dropout_leaves_an_embedding_alone_as_in_peft():
    mine, theirs = pair(Net, lora_dropout=0.9)
    torch.testing.assert_close(mine.train()(IDS), theirs.train()(IDS))
    assert torch.equal(mine(IDS), mine(IDS))


def test_the_config_is_pefts(tmp_path):
    mine, theirs = pair(Net)
    mine.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0] == configs[1]


def test_a_name_that_is_a_word_of_torchs_parameter_dict_is_refused():
    with pytest.raises(ConfigError, match="'setdefault' cannot name an adapter"):
        get_peft_model(Net(), LoraConfig(**OPTIONS), adapter_name="setdefault")
