"""Adapters made of several, beside the same in dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError
from rankfold.lora.layers.factors import LoraLayer
from rankfold.models.adapters.combine import CombineRequest, combine_adapters
from rankfold.peft_surface.weighted import KINDS

WEIGHTS = 0.7, -0.4
TARGETS = ["words", "linear", "turned", "image", "sound", "body"]


class Several(nn.Module):
    """One layer of each kind that an update of low rank is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.turned = nn.Embedding(11, 8), nn.Linear(8, 9), Conv1D(7, 9)
        self.image, self.sound, self.body = nn.Conv2d(6, 10, 3), nn.Conv1d(6, 10, 3), nn.Conv3d(6, 10, 2)

    def forward(self, ids):
        return self.turned(self.linear(self.words(ids)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    targets = TARGETS
    one = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    two = LoraConfig(r=2, lora_alpha=8, target_modules=targets, use_rslora=True)
    made = get_peft_model(Several(), one, "one")
    made.add_adapter("two", two)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def dense(layer):
    """The weighted sum of the updates (out, in)."""
    total = sum(w * layer.delta(name).double() for name, w in zip(("one", "two"), WEIGHTS, strict=True))
    return total.movedim(layer.row_dim, 0).flatten(1)


def update(layer, name):
    return layer.delta(name).double().movedim(layer.row_dim, 0).flatten(1)


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 7])
def test_svd_is_the_nearest_of_its_rank_in_every_kind_of_layer(model, rank):
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="svd", svd_rank=rank)
    assert len(layers_of(model)) == 6
    for layer in layers_of(model).values():
        u, s, vh = torch.linalg.svd(dense(layer), full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(update(layer, "sum"), nearest, rtol=1e-5, atol=1e-5)
        if rank >= 5:
            torch.testing.assert_close(update(layer, "sum"), dense(layer), rtol=1e-5, atol=1e-5)


def test_cat_is_the_weighted_sum_in_every_kind_of_layer(model):
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    for layer in layers_of(model).values():
        torch.testing.assert_close(update(layer, "sum"), dense(layer), rtol=1e-5, atol=1e-5)


def same_ranks(model):
    """``model`` with a third adapter, of the first one's rank and another scale."""
    model.add_adapter("third", LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS))
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for factor in layer.factors("third"):
                factor.copy_(torch.randn_like(factor))


def test_linear_is_the_weighted_sum_in_every_kind_of_layer(model):
    same_ranks(model)
    model.add_weighted_adapter(["one", "third"], [0.7, -1.5], "sum", combination_type="linear")
    for layer in layers_of(model).values():
        wanted = 0.7 * update(layer, "one") - 1.5 * update(layer, "third")
        torch.testing.assert_close(update(layer, "sum"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_the_pruning_methods_act_in_a_basis_that_the_updates_share(model, method):
    """Nothing pruned, they are what they are on the updates themselves where one basis is as good as another:
    magnitude pruning and DARE their sum, TIES of an adapter with itself that adapter."""
    same_ranks(model)
    pair = ["one", "one"] if method.endswith("ties") else ["one", "third"]
    for kind in (method, f"{method}_svd"):
        rank = {"svd_rank": 6} if kind.endswith("svd") else {}
        model.add_weighted_adapter(pair, [1.0, 1.0], kind, combination_type=kind, density=1.0, **rank)
        for layer in layers_of(model).values():
            wanted = update(layer, "one")
            wanted = wanted if method.endswith("ties") else wanted + update(layer, "third")
            torch.testing.assert_close(update(layer, kind), wanted, rtol=1e-4, atol=1e-4)


def test_pruned_updates_lie_in_the_rows_and_columns_of_the_adapters(model):
    same_ranks(model)
    model.add_weighted_adapter(["one", "third"], [1.0, 1.0], "few", combination_type="ties", density=0.3)
    for layer in layers_of(model).values():
        columns = torch.cat([update(layer, name) for name in ("one", "third")], dim=1)
        basis = torch.linalg.svd(columns, full_matrices=False).U[:, :6]
        found = update(layer, "few")
        torch.testing.assert_close(basis @ (basis.T @ found), found, rtol=1e-4, atol=1e-4)
        assert found.abs().max() > 1e-2


@pytest.mark.parametrize("how", KINDS)
def test_an_adapter_of_zeros_and_one_twice_make_no_noise(model, how):
    same_ranks(model)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.factors("third")[1].zero_()
    more = {} if how.removesuffix("_by_factor") in ("linear", "cat", "svd") else {"density": 0.5}
    for name, parts in (("with", ["one", "third"]), ("zeros", ["third", "third"]), ("twice", ["one", "one"])):
        model.add_weighted_adapter(parts, [1.0, 1.0], name, combination_type=how, **more)
    for layer in layers_of(model).values():
        for name in ("with", "zeros", "twice"):
            assert torch.isfinite(update(layer, name)).all()
        assert update(layer, "zeros").abs().max() < 1e-6
        if how in ("linear", "cat", "svd"):
            torch.testing.assert_close(update(layer, "with"), update(layer, "one"), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(update(layer, "twice"), 2 * update(layer, "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "patterns", [{}, {"use_rslora": True, "alpha_pattern": {"linear": 7}, "rank_pattern": {"image": 2}}]
)
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_patterns_keep_their_scale(how, patterns):
    torch.manual_seed(0)
    model = get_peft_model(
        Several(), LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **patterns), "one"
    )
    with torch.no_grad():
        for layer in layers_of(model).values():
            for factor in layer.factors("one"):
                factor.copy_(torch.randn_like(factor))
    model.add_weighted_adapter(["one", "one"], [0.5, 0.5], "same", combination_type=how)
    for layer in layers_of(model).values():
        torch.testing.assert_close(update(layer, "same"), update(layer, "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_one_adapter_at_weight_1_gives_itself_back(model, how):
    for name in ("one", "two"):
        model.add_weighted_adapter([name], [1.0], f"{name}_again", combination_type=how)
        for layer in layers_of(model).values():
            torch.testing.assert_close(
                update(layer, f"{name}_again"), update(layer, name), rtol=1e-5, atol=1e-5
            )


def test_svd_clamps_its_factors_at_the_quantile(model):
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="svd", svd_clamp=0.9)
    for layer in layers_of(model).values():
        values = torch.cat([factor.flatten() for factor in layer.factors("sum")])
        assert (values == values.max()).sum() > 1


def test_a_name_that_is_taken_is_an_error_and_changes_nothing(model):
    before = {path: update(layer, "two") for path, layer in layers_of(model).items()}
    with pytest.raises(ConfigError, match="there is an adapter 'two' already"):
        model.add_weighted_adapter(["one"], [2.0], "two")
    for path, layer in layers_of(model).items():
        assert torch.equal(update(layer, "two"), before[path])


def test_files_of_every_kind_of_layer_are_combined_alike(model, tmp_path):
    model.save_pretrained(tmp_path)
    done = combine_adapters(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "both", CombineRequest(weights=list(WEIGHTS))
    )
    model.load_adapter(tmp_path / "both", "both")
    assert (done.modules, done.rank) == (6, 5)
    for layer in layers_of(model).values():
        torch.testing.assert_close(update(layer, "both"), dense(layer), rtol=1e-5, atol=1e-5)
