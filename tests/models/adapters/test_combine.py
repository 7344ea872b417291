"""Adapters combined from their files: what the result computes, beside the weighted sum of dense updates."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomise, rankfold_command, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError, OutputError
from rankfold.lora.layers.factors import LoraLayer
from rankfold.models.adapters.combine import CombineRequest, combine_adapters


@pytest.fixture
def adapter(tmp_path):
    def make(name, *, seed=0, model=None, **config):
        options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | config
        adapted = get_peft_model(model or tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
        randomise(adapted, seed=seed)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def deltas(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer.delta("default").double().flatten(1) for path, layer in layers.items()}


def summed(folders, weights):
    found = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, delta in deltas(folder).items():
            found[path] = found.get(path, 0) + weight * delta
    return found


def combined(folders, out, **options):
    return combine_adapters(folders, out, CombineRequest.of(options))


def assert_same(found, expected, **limits):
    assert found.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], **(limits or {"rtol": 1e-5, "atol": 1e-6}))


def test_the_weighted_sum_is_exact_whatever_ranks_scales_and_targets_are(adapter, tmp_path):
    one = adapter("one", rank_pattern={"down_proj": 5})
    two = adapter("two", seed=1, r=2, use_rslora=True, target_modules=["q_proj", "embed_tokens"])
    done = combined([one, two], tmp_path / "both", weights=[0.6, -1.5])
    assert (done.rank, done.lost) == (5, 0)
    assert done.modules == len(deltas(tmp_path / "both")) == 5
    assert_same(deltas(tmp_path / "both"), summed([one, two], [0.6, -1.5]))


def test_peft_computes_the_same_with_the_combined_adapter(adapter, tmp_path):
    import peft

    one, two = adapter("one"), adapter("two", seed=1, target_modules=["v_proj", "q_proj"])
    combined([one, two], tmp_path / "both", weights=[0.5, 0.5])
    ids = torch.arange(8).reshape(2, 4)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs)
    model = peft.PeftModel.from_pretrained(tiny_llama(), one, "one").eval()
    model.load_adapter(two, "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_lower_rank_is_the_nearest_and_its_loss_is_told(adapter, tmp_path, rank):
    folders = [adapter("one"), adapter("two", seed=1)]
    done = combined(folders, tmp_path / "both", rank=rank)
    expected, lost, whole = {}, 0.0, 0.0
    for path, delta in summed(folders, [1, 1]).items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected[path] = (u[:, :rank] * s[:rank]) @ vh[:rank]
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    assert done.rank == rank
    assert done.lost == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert_same(deltas(tmp_path / "both"), expected)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_one_adapter_at_weight_1_gives_itself_back_where_nothing_is_left_out(adapter, tmp_path, method):
    one = adapter("one")
    options = {} if method == "linear" else {"density": 1.0}
    done = combined([one], tmp_path / "again", method=method, **options)
    assert (done.rank, done.likenesses) == (3, {})
    assert_same(deltas(tmp_path / "again"), deltas(one))


def test_an_adapter_with_itself_keeps_its_rank_and_is_told_to_be_the_same(adapter, tmp_path):
    one = adapter("one")
    done = combined([one, one], tmp_path / "again", weights=[0.25, 0.75])
    (alike,) = done.likenesses.values()
    assert done.rank == 3
    assert [alike.cosine, alike.read, alike.written] == pytest.approx([1, 1, 1])
    assert_same(deltas(tmp_path / "again"), deltas(one))


def test_the_likeness_is_that_of_the_dense_updates(adapter, tmp_path):
    folders = [adapter("one"), adapter("two", seed=1, r=2)]
    done = combined(folders, tmp_path / "both")
    one, two = map(deltas, folders)
    inner = sum(float((one[path] * two[path]).sum()) for path in one)
    norms = [sum(float(delta.square().sum()) for delta in each.values()) ** 0.5 for each in (one, two)]
    written = []
    for path in one:
        bases = [torch.linalg.svd(each[path])[0] for each in (one, two)]
        written.append(float((bases[0][:, :3].T @ bases[1][:, :2]).square().sum()) / 2)
    (alike,) = done.likenesses.values()
    assert alike.cosine == pytest.approx(inner / norms[0] / norms[1], abs=1e-6)
    assert alike.written == pytest.approx(sum(written) / len(written), abs=1e-6)
    assert alike.modules == len(one)


def test_ties_keeps_what_agrees_and_dare_hangs_on_the_seed(adapter, tmp_path):
    folders = [adapter("one"), adapter("two", seed=1)]
    found = {}
    for name, options in {
        "ties": {"method": "ties"},
        "first": {"method": "dare_linear", "seed": 1},
        "same": {"method": "dare_linear", "seed": 1},
        "other": {"method": "dare_linear", "seed": 2},
    }.items():
        combined(folders, tmp_path / name, **options)
        found[name] = deltas(tmp_path / name)
    assert_same(found["first"], found["same"], rtol=0, atol=0)
    plain = summed(folders, [1, 1])
    for path in plain:
        assert not torch.allclose(found["first"][path], found["other"][path], atol=1e-3)
        assert not torch.allclose(found["ties"][path], plain[path], atol=1e-3)


def test_biases_of_factors_are_summed_with_their_scale(adapter, tmp_path):
    folders = [adapter("one", lora_bias=True), adapter("two", seed=1, lora_bias=True, lora_alpha=2)]
    combined(folders, tmp_path / "both", weights=[2, 3])
    biases = []
    for folder in (*folders, tmp_path / "both"):
        model = PeftModel.from_pretrained(tiny_llama(), folder)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        biases.append([layer.scaling["default"] * layer.factor_bias("default") for layer in layers])
    for one, two, both in zip(*biases, strict=True):
        torch.testing.assert_close(both, 2 * one + 3 * two)


def test_what_is_no_sum_is_refused_with_all_reasons(adapter, tmp_path):
    plain = adapter("plain")
    dora, pissa = adapter("dora", use_dora=True), adapter("pissa", init_lora_weights="pissa")
    for folder, told in ((dora, "more than a product of factors"), (pissa, "changed the base weights")):
        with pytest.raises(AdapterError, match=told):
            combined([plain, folder], tmp_path / "out")
    heads = [adapter(f"head{n}", modules_to_save=["lm_head"]) for n in range(2)]
    with pytest.raises(AdapterError, match="each save modules whole"):
        combined(heads, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base_are_refused(adapter, tmp_path):
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(AdapterError, match="different bases: the weights differ"):
        combined([adapter("one"), adapter("two", model=other)], tmp_path / "out")


def test_what_one_of_them_saves_whole_is_taken(adapter, tmp_path):
    folders = [adapter("one"), adapter("head", seed=1, modules_to_save=["lm_head"])]
    done = combined(folders, tmp_path / "both", weights=[1, 0.5])
    assert "saves whole is taken as it is" in done.notes[0]
    heads = [
        PeftModel.from_pretrained(tiny_llama(), folder).get_output_embeddings().weight
        for folder in (folders[1], tmp_path / "both")
    ]
    assert torch.equal(*heads)
    assert_same(deltas(tmp_path / "both"), summed(folders, [1, 0.5]))


def test_mistakes_of_a_call_are_told(adapter, tmp_path):
    one = adapter("one")
    with pytest.raises(ConfigError, match="there are 1 adapters and 2 weights"):
        combined([one], tmp_path / "out", weights=[1, 2])
    with pytest.raises(ConfigError, match="density is for the methods"):
        combined([one], tmp_path / "out", density=0.5)
    with pytest.raises(ConfigError, match="weights.0: .*finite"):
        combined([one], tmp_path / "out", weights=["nan"])
    with pytest.raises(OutputError, match="not an empty folder"):
        combined([one], one)


def test_the_command_tells_the_likeness_and_writes_the_adapter(adapter, tmp_path):
    one, two, out = adapter("one"), adapter("two", seed=1), tmp_path / "both"
    done = rankfold_command("combine", one, two, "--weights", "0.5,0.5", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "cosine of their updates" in done.stdout
    assert "4 modules of rank 6; exact" in done.stdout
    told = rankfold_command("combine", one, two, "--rank", "1", "--out", tmp_path / "less", "--json")
    answer = json.loads(told.stdout)
    assert answer["rank"] == 1
    assert 0 < answer["lost"] < 1
    assert answer["likenesses"][0]["first"] == str(one)
    wrong = rankfold_command("combine", one, tmp_path / "none", "--out", tmp_path / "no")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_damaged_factors_are_named(adapter, tmp_path):
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    plain = adapter("plain")
    changes = {
        "NaN": lambda tensors: tensors[key.format("A")].fill_(float("nan")),
        "ranks of A and B differ": lambda tensors: tensors.update({key.format("B"): torch.ones(64, 2)}),
        "not both factors": lambda tensors: tensors.pop(key.format("B")),
        "no low-rank factors": lambda tensors: tensors.clear(),
    }
    for told, change in changes.items():
        damaged = adapter("damaged")
        tensors = load_file(damaged / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, damaged / "adapter_model.safetensors")
        (damaged / "rankfold.json").unlink()
        with pytest.raises(AdapterError, match=told):
            combined([plain, damaged], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sum_of_half_precision_factors_is_as_exact_as_of_others(adapter, tmp_path):
    folders = [adapter("one"), adapter("two", seed=1)]
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: t.bfloat16() for key, t in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "rankfold.json").unlink()
    combined(folders, tmp_path / "both")
    assert_same(deltas(tmp_path / "both"), summed(folders, [1, 1]))


def test_any_two_of_several_are_held_against_each_other(adapter, tmp_path):
    first, second, third = adapter("one", target_modules=["q_proj"]), adapter("two"), adapter("three", seed=1)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    tensors = load_file(third / "adapter_model.safetensors")
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    save_file(tensors, third / "adapter_model.safetensors")
    (third / "rankfold.json").unlink()
    with pytest.raises(AdapterError, match=r"layers.0.mlp.down_proj has updates of"):
        combined([first, second, third], tmp_path / "out")
