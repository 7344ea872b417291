from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from conftest import tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError, TargetError
from rankfold.lora.layers.tokens import TokenEmbedding, TokenIndex, TokenLinear

TOKENS = [7, 3, 5]
CASES = [
    (True, TOKENS),
    (False, TOKENS),
    (False, {"embed_tokens": [3, 5], "lm_head": [8, 2, 5]}),
    (True, {"embed_tokens": [3, 5], "lm_head": [3, 5]}),
    (False, {"lm_head": [9]}),
]


class Lookup(nn.Module):
    """An embedding with a tied head that has a bias."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.embed_tokens, self.mix = embedding, nn.Linear(width, width)
        self.head = nn.Linear(width, embedding.num_embeddings)
        self.head.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed_tokens(ids)))


def lookup(seed: int = 0) -> Lookup:
    torch.manual_seed(seed)
    return Lookup(nn.Embedding(10, 4))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 10, (2, 9), generator=torch.Generator().manual_seed(3))


def train_by_chance(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def config(tokens: object = TOKENS, **options) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["mix"], trainable_token_indices=tokens, **options)


def adapted(net: Lookup | None = None, **options) -> PeftModel:
    model = get_peft_model(net or lookup(), config(**options))
    train_by_chance(model)
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("tied", "tokens"), CASES, ids=str)
@pytest.mark.peft("`trainable_token_indices`", "same", "same")
def test_what_is_saved_here_gives_equal_logits_in_peft(tied, tokens, tmp_path, ids):
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    ours = get_peft_model(tiny_llama(tied=tied), LoraConfig(**options)).eval()
    train_by_chance(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tied=tied), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids))
    assert not torch.allclose(logits(tiny_llama(tied=tied), ids), logits(ours, ids))


@pytest.mark.parametrize(("tied", "tokens"), CASES, ids=str)
@pytest.mark.peft("`trainable_token_indices`", "same", "same")
def test_what_peft_saved_gives_equal_logits_here_and_has_the_same_keys(tied, tokens, tmp_path, ids):
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    theirs = peft.get_peft_model(tiny_llama(tied=tied), peft.LoraConfig(**options)).eval()
    train_by_chance(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny_llama(tied=tied), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids))
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    torch.testing.assert_close(files[0], files[1], rtol=0, atol=0)
    assert {k.rpartition(".")[2] for k in files[0] if "token" in k} == {"trainable_tokens_delta"}


def test_the_rows_start_as_those_of_the_base_in_float32():
    net = lookup().bfloat16()
    model = get_peft_model(net, config())
    rows = model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(rows, net.embed_tokens.weight[TOKENS].float())
    assert rows.dtype == torch.float32
    narrow = get_peft_model(lookup().bfloat16(), config(), autocast_adapter_dtype=False)
    assert narrow.embed_tokens.token_adapter.trainable_tokens_delta["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_output_of_the_embedding_is_the_base_to_the_last_bit_and_the_heads_is_close(dtype, ids):
    expected = lookup().to(dtype)(ids)
    model = get_peft_model(lookup().to(dtype), config())
    assert torch.equal(model.embed_tokens(ids), lookup().to(dtype).embed_tokens(ids))
    out = model(ids)
    others = [token for token in range(10) if token not in TOKENS]
    assert torch.equal(out[..., others], expected[..., others])
    torch.testing.assert_close(out, expected)


def test_the_output_and_the_gradients_are_those_of_a_whole_weight_with_the_rows_in_it(ids):
    model = adapted(lookup().double())
    net = model.get_base_model()
    rows = model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    whole = net.embed_tokens.weight.detach().clone()
    whole[TOKENS] = rows.detach()
    whole.requires_grad_(True)
    x = F.embedding(ids, whole)
    a, b = net.mix.factors("default")
    hidden = F.linear(x, net.mix.weight + net.mix.scaling["default"] * (b @ a), net.mix.bias)
    expected = F.linear(hidden, whole, net.head.bias)
    torch.testing.assert_close(model(ids), expected)
    expected.square().sum().backward()
    model(ids).square().sum().backward()
    torch.testing.assert_close(rows.grad, whole.grad[TOKENS])
    assert net.embed_tokens.weight.grad is None


def test_only_the_rows_and_the_factors_are_trained_and_the_base_keys_stay():
    net = lookup()
    before = copy.deepcopy(net.state_dict())
    model = get_peft_model(net, config())
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    }
    assert list(before) == [key for key in net.state_dict() if "lora_" not in key and "token_" not in key]
    train_by_chance(model)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert type(net.embed_tokens) is TokenEmbedding
    assert type(net.head) is TokenLinear


def test_an_embedding_that_scales_scales_the_rows_too(ids):
    def net() -> Lookup:
        torch.manual_seed(0)
        return Lookup(Gemma3TextScaledWordEmbedding(10, 4, 0, embed_scale=3.0))

    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(net().to(dtype), config())
        assert torch.equal(model.embed_tokens(ids), net().to(dtype).embed_tokens(ids))
    model = adapted(net())
    before = model(ids)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), before)


def test_the_padding_row_is_read_and_gets_no_gradient_from_the_input(ids):
    net = Lookup(nn.Embedding(10, 4, padding_idx=3))
    model = adapted(net)
    rows = model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    out = model.embed_tokens(torch.tensor([3, 5]))
    torch.testing.assert_close(out, rows[[1, 2]])
    out.sum().backward()
    assert torch.equal(rows.grad, torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1).expand(3, 4))


def test_looking_up_takes_int32_ids_and_non_contiguous_ones_and_tokens_past_the_last_row():
    index, rows = TokenIndex([4, 1], None, torch.device("cpu")), torch.randn(2, 3)
    ids = torch.tensor([[1, 9], [4, 0]], dtype=torch.int32).T
    hits, values = index.read(rows, ids, torch.float32)
    assert hits.squeeze(-1).tolist() == [[True, True], [False, False]]
    assert torch.equal(values[0], rows[[1, 0]])


def test_disabled_the_model_is_the_base_to_the_last_bit(ids):
    model = adapted()
    trained = model(ids)
    with model.disable_adapter():
        assert torch.equal(model(ids), lookup()(ids))
    assert torch.equal(model(ids), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_output_and_unmerging_gives_the_bits_back(dtype, ids):
    net = lookup().to(dtype)
    before = net.embed_tokens.weight.detach().clone()
    model = adapted(net)
    expected = model(ids)
    model.merge_adapter()
    assert not torch.equal(net.embed_tokens.weight, before)
    assert net.head.weight is net.embed_tokens.weight
    torch.testing.assert_close(model(ids), expected, rtol=2e-2, atol=2e-2)
    model.unmerge_adapter()
    assert torch.equal(net.embed_tokens.weight, before)
    assert torch.equal(model(ids), expected)


def test_merge_and_unload_gives_a_plain_tied_model(ids):
    model = adapted()
    expected = model(ids)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(ids), expected)
    assert [type(m) for m in plain.modules()] == [type(m) for m in lookup().modules()]
    assert all(
        vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), lookup().modules(), strict=True)
    )
    assert plain.head.weight is plain.embed_tokens.weight


def test_unloading_gives_the_base_back_even_while_merged(ids):
    model = adapted()
    model.merge_adapter()
    assert torch.equal(model.unload()(ids), lookup()(ids))


def test_adapters_switch_and_one_is_deleted_with_the_tie_intact(ids):
    model = adapted()
    first = model(ids)
    model.add_adapter("second", config([0, 3]))
    assert torch.equal(model(ids), first)
    model.set_adapter("second")
    train_by_chance(model, seed=4)
    second = model(ids)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(model(ids), first)
    model.delete_adapter("default")
    assert torch.equal(model(ids), second)
    assert list(model.embed_tokens.token_adapter.trainable_tokens_delta) == ["second"]
    with pytest.raises(ConfigError, match="not found"):
        model.set_adapter("default")


def test_an_adapter_added_while_another_is_merged_starts_from_the_bases_rows():
    model = adapted()
    model.merge_adapter()
    model.add_adapter("second", config([3]))
    rows = model.embed_tokens.token_adapter.trainable_tokens_delta["second"]
    assert torch.equal(rows, lookup().embed_tokens.weight[[3]])


def test_two_adapters_with_different_tokens_are_active_together_and_with_a_common_one_not(ids):
    model = adapted()
    model.add_adapter("apart", config([0, 1]))
    model.add_adapter("common", config([3, 9]))
    model.set_adapter(["default", "apart"])
    train_by_chance(model)
    expected = model(ids)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), expected)
    with pytest.raises(
        ConfigError, match=r"embed_tokens: .*more than one of .* has rows for the tokens \[3\]"
    ):
        model.set_adapter(["default", "common"])
    assert model.active_adapters == ["default", "apart"]
    model.unmerge_adapter()
    with pytest.raises(MergeError, match=r"more than one of .* has rows for the tokens \[3\]"):
        model.merge_adapter(["default", "common"])


def test_rows_too_large_for_the_base_are_not_merged():
    model = adapted(lookup().half())
    with torch.no_grad():
        model.embed_tokens.token_adapter.trainable_tokens_delta["default"].fill_(1e6)
    with pytest.raises(
        MergeError, match=r"embed_tokens: NaNs detected in the merged weights.* in torch.float16"
    ):
        model.merge_adapter()


def test_a_copy_of_the_model_has_its_own_rows_for_both_ends(ids):
    model = adapted()
    before = model(ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed_tokens.token_adapter.trainable_tokens_delta["default"].zero_()
    assert torch.equal(model(ids), before)
    assert torch.equal(twin(ids)[..., 3], twin.head.bias[3].expand(ids.shape))


def test_a_head_with_other_tokens_than_its_tied_embedding_goes_its_own_way():
    model = get_peft_model(lookup(), config({"embed_tokens": [3], "head": [4]}))
    assert model.head.leader is None
    with pytest.raises(TargetError, match="are tied and have different indices"):
        get_peft_model(lookup(), config({"embed_tokens": [3], "head": [4]}, ensure_weight_tying=True))
    with pytest.raises(TargetError, match="head is tied for one adapter and not for another"):
        model.add_adapter("tied", config([3]))


def test_the_forward_compiles_to_one_graph(ids):
    model = adapted()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids))


class Doubling(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("net", "tokens", "message"),
    [
        (lookup(), [3, 10, 12], r"embed_tokens has 10 rows, and there is no row \[10, 12\]"),
        (lookup(), {"embed": [3]}, "names 'embed', and no module is called that"),
        (nn.ModuleDict({"mix": nn.Linear(4, 4)}), [3], "the model has no input embedding"),
        (lookup(), {"embed_tokens": [3], "mix": [1]}, "mix is in target_modules and in"),
        (Lookup(Doubling(10, 4)), [3], "is a Doubling, which computes something of its own"),
        (Lookup(nn.Embedding(10, 4, max_norm=1.0)), [3], "has max_norm or scale_grad_by_freq"),
    ],
    ids=["range", "name", "none", "target", "subclass", "norm"],
)
def test_rows_that_cannot_be_trained_are_refused_and_nothing_is_changed(net, tokens, message):
    before = [type(m) for m in net.modules()]
    with pytest.raises(TargetError, match=message):
        get_peft_model(net, config(tokens))
    assert [type(m) for m in net.modules()] == before


def test_rows_do_not_meet_factors_or_copies_of_the_same_module():
    model = adapted()
    with pytest.raises(TargetError, match="head is a target, and another adapter trains it"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(TargetError, match="embed_tokens carries another kind of adapter already"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["mix"], modules_to_save=["embed_tokens"]))
    with pytest.raises(TargetError, match="embed_tokens is in modules_to_save and in"):
        get_peft_model(lookup(), config(modules_to_save=["embed_tokens"]))


@pytest.mark.parametrize("tokens", [[], [-1], [1, 1], [1.0], [True], {}, {"embed_tokens": []}, 3, "all"])
def test_indices_must_be_different_whole_numbers_from_zero(tokens):
    with pytest.raises(ConfigError, match="trainable_token_indices must be different whole numbers from 0"):
        LoraConfig(trainable_token_indices=tokens)


@pytest.mark.peft("trainable tokens with a tied head that has a bias", "the bias is lost", "kept")
def test_peft_loses_the_bias_of_a_tied_head_and_we_do_not(ids):
    class WithBias(type(tiny_llama())):  # type: ignore[misc]
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(32, config.vocab_size)  # type: ignore[attr-defined]
            self.post_init()

    def net() -> nn.Module:
        torch.manual_seed(0)
        return WithBias(tiny_llama(tied=True).config).eval()

    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": TOKENS}
    base = net()
    nn.init.normal_(base.lm_head.bias)
    expected = logits(base, ids)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    ours = get_peft_model(base, LoraConfig(**options)).eval()
    torch.testing.assert_close(logits(ours, ids), expected)
    assert not torch.allclose(logits(theirs, ids), expected, atol=1e-2)
