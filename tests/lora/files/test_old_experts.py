from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from rankfold import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from rankfold.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # of PEFT
    pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module was matched"),
]
SIZES = {
    **{"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "vocab_size": 30},
}
EXPERTS = 3
SHAPES = {"w1": (12, 16), "w2": (16, 12), "w3": (12, 16), "gate": (EXPERTS, 16), "q_proj": (16, 16)}
QWEN = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12), "q_proj": (16, 16)}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SIZES)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    more = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts_per_tok": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=EXPERTS, **more, **SIZES)).eval()


def places(name: str, mixture: str) -> list[str]:
    """Where transformers 4 had the layers of this name."""
    layers = [f"base_model.model.model.layers.{n}" for n in range(2)]
    if name == "q_proj":
        return [f"{layer}.self_attn.q_proj" for layer in layers]
    if name == "gate":
        return [f"{layer}.{mixture}.gate" for layer in layers]
    return [f"{layer}.{mixture}.experts.{e}.{name}" for layer in layers for e in range(EXPERTS)]


def old_adapter(
    folder, targets, shapes=None, mixture="block_sparse_moe", **options
) -> dict[str, torch.Tensor]:
    """An adapter as it was saved under transformers 4, with random factors."""
    config = {"r": 2, "lora_alpha": 5, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | options
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (rows, columns) in ((n, s) for n, s in (shapes or SHAPES).items() if n in targets):
        for place in places(name, mixture):
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    peft.LoraConfig(**config).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


def ids() -> torch.Tensor:
    return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(3))


MARK = pytest.mark.peft(
    "experts saved under transformers 4 (Mixtral, Qwen2-MoE)",
    "fused on loading; not without w2, rsLoRA scaled wrongly, `lora_dropout` refused",
    "fused on loading, exactly, or refused",
)


@pytest.mark.parametrize(
    "targets",
    [["w1", "w2", "w3"], ["w2"], ["q_proj", "gate", "w1", "w2", "w3"]],
    ids=str,
)
@MARK
def test_old_experts_give_pefts_logits(targets, tmp_path):
    old_adapter(tmp_path, targets)
    ours = PeftModel.from_pretrained(mixtral(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    assert not torch.allclose(ours(input_ids=ids()).logits, mixtral()(ids()).logits)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    told = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r", "lora_alpha"):
        assert _plain(told[0][name]) == _plain(told[1][name])


def test_old_experts_are_fused_into_an_adapter_that_is_in_place(tmp_path):
    tensors = old_adapter(tmp_path, ["q_proj", "gate", "w1", "w2", "w3"])
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path)
    config = loaded.peft_config["default"].replaced(inference_mode=False)
    model = get_peft_model(mixtral(), config).eval()
    before = model(input_ids=ids()).logits
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    torch.testing.assert_close(model(input_ids=ids()).logits, loaded(input_ids=ids()).logits)
    assert not torch.allclose(before, loaded(input_ids=ids()).logits, atol=1e-3)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"w1": 4, "w3": 4}}], ids=str
)
@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w1", "w3", "q_proj"]], ids=str)
@MARK
def test_the_fused_weights_hold_each_experts_own_product(options, targets, tmp_path):
    tensors = old_adapter(tmp_path, targets, **options)
    tuned, plain = PeftModel.from_pretrained(mixtral(), tmp_path).merge_and_unload(), mixtral()
    for n in range(2):
        after, before = (model.model.layers[n].mlp.experts for model in (tuned, plain))
        gate_up, down = after.gate_up_proj - before.gate_up_proj, after.down_proj - before.down_proj
        for expert in range(EXPERTS):
            place = f"base_model.model.model.layers.{n}.block_sparse_moe.experts.{expert}"
            whole = {}
            for name in sorted({*targets} - {"q_proj"}):
                alpha = options.get("alpha_pattern", {}).get(name, 5)
                scale = alpha / (math.sqrt(2) if options.get("use_rslora") else 2)
                pair = (tensors[f"{place}.{name}.lora_{side}.weight"] for side in "BA")
                whole[name] = scale * torch.linalg.multi_dot([*pair])
            torch.testing.assert_close(
                gate_up[expert], torch.cat([whole["w1"], whole["w3"]]), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(down[expert], whole.get("w2", down[expert] * 0), rtol=1e-4, atol=1e-5)


def test_peft_loses_gate_and_up_without_down_and_misreads_rslora(tmp_path):
    old_adapter(tmp_path / "gate_up", ["w1", "w3", "q_proj"])
    with pytest.warns(UserWarning, match="Found missing adapter keys .*experts.lora_A"):
        peft.PeftModel.from_pretrained(mixtral(), tmp_path / "gate_up")
    old_adapter(tmp_path / "rslora", ["w1", "w2", "w3"], use_rslora=True)
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "rslora")
    experts = theirs.base_model.model.model.layers[0].mlp.experts
    assert math.isclose(experts.base_layer.scaling["default"], 10 / math.sqrt(4))
    assert not math.isclose(10 / math.sqrt(4), 5 / math.sqrt(2))


@MARK
def test_an_adapter_with_dropout_is_loaded_where_peft_refuses(tmp_path):
    old_adapter(tmp_path, ["w1", "w2", "w3"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.PeftModel.from_pretrained(mixtral(), tmp_path)
    ours = PeftModel.from_pretrained(mixtral(), tmp_path)
    old_adapter(tmp_path / "plain", ["w1", "w2", "w3"])
    plain = PeftModel.from_pretrained(mixtral(), tmp_path / "plain")
    assert torch.equal(ours(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    with pytest.raises(AdapterError, match=r"lora_dropout=0\.1: it does not work with target_parameters"):
        PeftModel.from_pretrained(mixtral(), tmp_path, is_trainable=True)


@MARK
def test_qwens_experts_are_fused_and_its_shared_expert_is_left(tmp_path):
    tensors = old_adapter(tmp_path, [*QWEN], QWEN, "mlp")
    shared = {"gate_proj": (20, 16), "up_proj": (20, 16), "down_proj": (16, 20)}
    for n in range(2):
        for name, (rows, columns) in shared.items():
            place = f"base_model.model.model.layers.{n}.mlp.shared_expert.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, columns)
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    ours = PeftModel.from_pretrained(qwen(), tmp_path)
    assert ours.peft_config["default"].target_modules == {"down_proj", "gate_proj", "q_proj", "up_proj"}
    assert ours.peft_config["default"].target_parameters == ["down_proj", "gate_up_proj"]
    expected = ours(input_ids=ids()).logits
    ours.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(qwen(), tmp_path / "again")
    assert torch.equal(again(input_ids=ids()).logits, expected)


def test_a_pattern_for_the_old_names_becomes_a_list_of_the_new(tmp_path):
    tensors = old_adapter(tmp_path, ["q_proj", "w1", "w2", "w3"])
    listed = PeftModel.from_pretrained(mixtral(), tmp_path)(input_ids=ids()).logits
    peft.LoraConfig(r=2, lora_alpha=5, target_modules=r".*\.(q_proj|w[123])").save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert torch.equal(ours(input_ids=ids()).logits, listed)
    assert tensors.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


PLACE = "base_model.model.model.layers.1.block_sparse_moe.experts.2"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t.pop(f"{PLACE}.w3.lora_B.weight"),
            {},
            r"experts\.2\.w3\.lora_B\.weight is not in the file",
        ),
        (lambda t: [t.pop(k) for k in [*t] if ".w3." in k], {}, r"w3\.lora_A\.weight is not in the file"),
        (lambda t: None, {"rank_pattern": {"w1": 1}}, "differ in rank or alpha"),
        (lambda t: None, {"alpha_pattern": {"w3": 7}}, "differ in rank or alpha"),
        (
            lambda t: t.update({f"{PLACE}.w1.lora_magnitude_vector": torch.ones(12)}),
            {},
            "w1.lora_magnitude_vector has no place",
        ),
        (lambda t: t.update({f"{PLACE}.w1.lora_A.weight": torch.ones(2, 5)}), {}, r"factors of \(in, out\)"),
        (
            lambda t: t.update({f"{PLACE}.w9.lora_A.weight": torch.ones(2, 5)}),
            {},
            r"\.w9 is no layer that was fused",
        ),
        (
            lambda t: t.update({f"{PLACE.replace('.2', '.7')}.w1.lora_A.weight": torch.ones(2, 16)}),
            {},
            r"experts\.7\.w1\.lora_A\.weight has no place",
        ),
    ],
)
def test_what_cannot_be_fused_exactly_is_refused_by_name(change, options, message, tmp_path):
    tensors = old_adapter(tmp_path, ["w1", "w2", "w3"], **options)
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = mixtral()
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.model.layers[0].mlp.experts) is type(mixtral().model.layers[0].mlp.experts)


def test_experts_that_are_modules_are_left_alone():
    from rankfold.lora.files.old_experts import with_fused_experts

    net = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    key = "base_model.model.moe.experts.0.lora_A.weight"
    config = LoraConfig(target_modules=["0"])
    assert with_fused_experts(config, {key: torch.ones(1)}, net) == (config, {key: torch.ones(1)})
