"""Each variant beside PEFT 0.21.2's: the start, the output, the gradients, merging and files."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import ConfigError, MergeError

IDS = torch.randint(3, 400, (3, 9), generator=torch.Generator().manual_seed(3))
IDS[0, 4:6], IDS[1, 7:9] = torch.tensor([1, 2]), torch.tensor([1, 2])  # the third row has no invocation
USUAL = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
VARIANTS = {
    "kasa": {"kasa_config": KasaConfig(beta=0.2, gamma=0.3)},
    "bdlora of A": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj", "down_proj"], nblocks=2)},
    "bdlora of B": {
        "use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=4, match_strict=False),
    },
    "alora": {"alora_invocation_tokens": [1, 2]},
}
MERGEABLE = [name for name in VARIANTS if name != "alora"]


def of_both(variant: str) -> tuple[PeftModel, peft.PeftModel]:
    """The same adapter on the same base here and in PEFT, started from one seed."""
    models = []
    for library in (rankfold, peft):
        base = tiny_llama()
        torch.manual_seed(5)
        models.append(library.get_peft_model(base, library.LoraConfig(**USUAL, **VARIANTS[variant])))
    return models[0], models[1]


def tensors(model) -> dict[str, torch.Tensor]:
    return {key.replace(".base_layer", ""): t for key, t in model.named_parameters() if "lora_" in key}


def equal_values(ours, theirs) -> None:
    """Random values for both."""
    randomise(ours)
    with torch.no_grad():
        for key, tensor in tensors(theirs).items():
            tensor.copy_(tensors(ours)[key])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_seed_starts_pefts_values(variant):
    ours, theirs = of_both(variant)
    own, other = tensors(ours), tensors(theirs)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.peft("aLoRA, KaSA, BD-LoRA", "same", "same")
def test_output_and_gradients_are_pefts(variant):
    ours, theirs = of_both(variant)
    equal_values(ours, theirs)
    outputs = [model(input_ids=IDS, labels=IDS) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for key, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[key].grad, tensor.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", MERGEABLE)
def test_merging_changes_nothing_and_unloading_gives_the_base_back(variant):
    before = tiny_llama()
    model = get_peft_model(tiny_llama(), LoraConfig(**USUAL, **VARIANTS[variant]))
    randomise(model)
    wanted = model(input_ids=IDS).logits
    kept = copy.deepcopy(model)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    unloaded = kept.unload().state_dict()
    assert all(torch.equal(unloaded[key], tensor) for key, tensor in before.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_read_on_both_sides(variant, tmp_path):
    ours, theirs = of_both(variant)
    equal_values(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    names = [{*load_file(tmp_path / side / "adapter_model.safetensors")} for side in ("ours", "theirs")]
    assert names[0] == names[1]
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        read = [
            peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours"),
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs"),
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours"),
        ]
        for model in read:
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_activated_adapter_answers_as_in_peft():
    ours, theirs = of_both("alora")
    equal_values(ours, theirs)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(IDS),
    }
    answers = [model.eval().generate(input_ids=IDS, **options) for model in (ours, theirs)]
    assert torch.equal(answers[0], answers[1])
    with ours.disable_adapter():
        plain = ours.generate(input_ids=IDS, **options)
    assert torch.equal(answers[0][2], plain[2])  # no invocation
    assert not torch.equal(answers[0][:2], plain[:2])


def test_an_activated_adapter_is_not_merged():
    model, _ = of_both("alora")
    with pytest.raises(MergeError, match="aLoRA does not support merging"):
        model.merge_adapter()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.get_delta_weight("default").shape == layer.weight.shape


def test_before_its_invocation_an_activated_adapter_changes_nothing():
    model, _ = of_both("alora")
    randomise(model)
    changed = model(input_ids=IDS).logits
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
    same = [(changed[row] == plain[row]).all(-1) for row in range(3)]
    assert same[0].tolist() == [True] * 4 + [False] * 5
    assert same[1].tolist() == [True] * 7 + [False] * 2
    assert same[2].all()


def test_recomputed_activations_know_the_invocation():
    model, _ = of_both("alora")
    randomise(model)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {key: tensor.grad.clone() for key, tensor in tensors(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for _ in range(2):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for key, tensor in tensors(model).items():
            torch.testing.assert_close(tensor.grad, wanted[key])


def test_a_batch_of_activated_and_plain_adapters_is_shared():
    model, _ = of_both("alora")
    model.add_adapter("other", LoraConfig(**USUAL, alora_invocation_tokens=[int(IDS[2, 3])]))
    model.add_adapter("plain", LoraConfig(**USUAL))
    randomise(model)
    model.eval()
    wanted = []
    for name, row in zip(("default", "plain", "other"), IDS, strict=True):
        model.set_adapter(name)
        wanted.append(model(input_ids=row[None]).logits)
    found = model(input_ids=IDS, adapter_names=["default", "plain", "other"]).logits
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_the_terms_of_kasas_loss_are_pefts():
    ours, theirs = of_both("kasa")
    equal_values(ours, theirs)
    torch.testing.assert_close(ours._get_kasa_loss(), theirs.base_model._get_kasa_loss())
    ours._get_kasa_loss().backward()
    assert all(tensor.grad is not None for tensor in tensors(ours).values())


def test_two_adapters_of_kasa_share_what_is_left_of_the_base():
    config = LoraConfig(**USUAL, **VARIANTS["kasa"])
    model = get_peft_model(tiny_llama(), config, "one")
    model.add_adapter("two", config)
    randomise(model)
    model.set_adapter("two")
    wanted = model(input_ids=IDS).logits
    model.delete_adapter("one")
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    with pytest.raises(ConfigError, match="has changed its base weight already"):
        model.add_adapter("three", LoraConfig(**USUAL | {"r": 5}, **VARIANTS["kasa"]))


REFUSED = {
    "two variants": ({"kasa_config": {}, "use_dora": True}, "of which one may be used"),
    "blocks that do not fit": (
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 3}},
        "in_features=32 is not divisible by nblocks=3",
    ),
    "both sides": (
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"], "nblocks": 2}},
        "matches both A and B",
    ),
    "neither side": ({"use_bdlora": {"target_modules_bd_a": ["x"], "nblocks": 2}}, "matches neither A nor B"),
    "too large a rank": ({"kasa_config": {}, "r": 32}, "smaller than min"),
    "an embedding": ({"kasa_config": {}, "target_modules": ["embed_tokens"]}, "does not support kasa_config"),
    "a negative weight": ({"kasa_config": {"beta": -1}}, "must be non-negative"),
    "words for tokens": ({"alora_invocation_tokens": ["go"]}, "a list of token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(case):
    options, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told):
        get_peft_model(tiny_llama(), LoraConfig(**USUAL | options))


def test_a_file_without_kasas_diagonal_is_refused_by_its_key(tmp_path):
    model, _ = of_both("kasa")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if "lora_diag" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(rankfold.RankfoldError, match="lora_diag"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, allow=())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.one(x).relu())


def test_offsets_are_given_by_hand_where_there_are_no_tokens():
    options = {"r": 2, "target_modules": ["one"], "alora_invocation_tokens": [1]}
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        model = get_peft_model(Net(), LoraConfig(**options))
    randomise(model)
    x = torch.randn(2, 5, 6)
    changed, plain = model(x, alora_offsets=[2, None]), model(x)
    assert (changed != plain).any(-1).tolist() == [[False] * 3 + [True] * 2, [False] * 5]
