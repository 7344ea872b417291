from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import tiny_llama
from image_models import FAMILIES, tiny_image_model
from internvl_reference import IMAGE_TOKEN, tiny_config
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import ConfigError, TargetError
from rankfold.lora.placing.targets import find_targets
from rankfold.models.adapters.modalities import ModelParts, adapter_scope, model_parts
from rankfold.models.internvl.config import native_config

LLAMA_LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PLACES = {
    "internvl": ("model.language_model", "model.multi_modal_projector", "model.vision_tower"),
    "qwen2_5_vl": ("model.language_model", "model.visual.merger", "model.visual"),
    "llava": ("model.language_model", "model.multi_modal_projector", "model.vision_tower"),
    "gemma3": ("model.language_model", "model.multi_modal_projector", "model.vision_tower"),
    "smolvlm": ("model.text_model", "model.connector", "model.vision_model"),
    "idefics3": ("model.text_model", "model.connector", "model.vision_model"),
}


def model_of(family):
    if family != "internvl":
        return tiny_image_model(family)[0]
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    torch.manual_seed(0)
    return InternVLForConditionalGeneration(
        InternVLConfig(**native_config(tiny_config(), IMAGE_TOKEN))
    ).eval()


@pytest.fixture(scope="module", params=["internvl", *FAMILIES])
def family(request):
    return request.param, model_of(request.param)


def matched(model, scope):
    return find_targets(model, LoraConfig(**scope.options()))


def test_the_parts_are_found_by_what_the_model_says(family):
    name, model = family
    language, projector, vision = PLACES[name]
    assert model_parts(model) == ModelParts((language,), (projector,), (vision,))
    assert model_parts(model).part_of("lm_head") is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj"])
def test_by_default_only_the_language_models_layers_are_meant(family, targets):
    name, model = family
    scope = adapter_scope(model, targets)
    found = matched(model, scope)
    assert all(path.startswith(f"{PLACES[name][0]}.") for path in found)
    endings = sorted({path.rpartition(".")[2] for path in found})
    assert endings == (LLAMA_LINEARS if targets == "all-linear" else ["q_proj", "v_proj"])
    assert len(found) == 2 * len(endings)
    assert isinstance(scope.target_modules, list)
    assert scope.modules_to_save == []
    assert len(scope.told) == 3
    assert scope.told[0].startswith(f"language model ({PLACES[name][0]}): LoRA on 2 ")
    assert scope.told[1:] == [
        f"projector ({PLACES[name][1]}): frozen",
        f"vision tower ({PLACES[name][2]}): frozen",
    ]


def test_peft_itself_would_match_the_tower_too(family):
    """The reason for all this: the same words mean more to PEFT."""
    name, model = family
    target = "qkv" if name == "qwen2_5_vl" else "q_proj"  # its tower has them in one layer
    assert any(
        path.startswith(f"{PLACES[name][2]}.")
        for path in find_targets(model, LoraConfig(target_modules=[target]))
    )


def test_projector_and_tower_are_trained_on_request(family):
    name, model = family
    _, projector, vision = PLACES[name]
    scope = adapter_scope(model, "all-linear", ["language", "projector", "vision"])
    found = matched(model, scope)
    assert any(path.startswith(f"{vision}.") for path in found)
    assert not any(path.startswith(f"{projector}.") for path in found)
    assert f".{projector}".endswith(f".{scope.modules_to_save[0]}")
    assert f"projector ({projector}): trained whole" in scope.told
    assert not any("frozen" in line for line in scope.told)


def test_a_projector_can_be_adapted_instead(family):
    name, model = family
    if name == "gemma3":
        with pytest.raises(TargetError, match="matched nothing in the projector"):
            adapter_scope(model, "all-linear", ["projector"], whole=())  # its matrix is no linear layer
        return
    scope = adapter_scope(model, "all-linear", ["projector"], whole=())
    found = matched(model, scope)
    assert found
    assert all(path.startswith(f"{PLACES[name][1]}.") for path in found)
    assert scope.modules_to_save == []


def test_a_scope_makes_an_adapter_that_trains_just_that(family):
    name, model = family
    if name != "internvl":
        return
    scope = adapter_scope(model, ["q_proj"], ["language", "projector"])
    wrapped = get_peft_model(model_of(name), LoraConfig(r=2, **scope.options()))
    trained = {path for path, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {path.split("lora_")[0].split("modules_to_save")[0] for path in trained} == {
        *(f"base_model.model.model.language_model.layers.{n}.self_attn.q_proj." for n in range(2)),
        *{p.split("modules_to_save")[0] for p in trained if "multi_modal_projector" in p},
    }
    assert sum("multi_modal_projector" in path for path in trained) == 6


def test_names_that_are_found_elsewhere_only_are_an_error(family):
    name, model = family
    entry = "qkv" if name == "qwen2_5_vl" else "fc1"
    with pytest.raises(TargetError, match=rf"the language model: \['{entry}'\]; found in the vision tower, "):
        adapter_scope(model, ["q_proj", entry])
    with pytest.raises(TargetError, match="matched no module"):
        adapter_scope(model, ["no_such_layer"])


def test_parts_that_cannot_be_trained_are_told_all_at_once():
    text = tiny_llama()
    with pytest.raises(ConfigError) as caught:
        adapter_scope(text, train=["langauge", "vision"])
    assert "no part 'langauge' (did you mean 'language'?)" in str(caught.value)
    assert "a LlamaForCausalLM has no vision tower" in str(caught.value)
    with pytest.raises(ConfigError, match="none is named"):
        adapter_scope(text, train=[])
    with pytest.raises(ConfigError, match="leaves no part for LoRA"):
        adapter_scope(model_of("internvl"), train=["projector"])


def test_a_text_model_is_all_language():
    model = tiny_llama()
    scope = adapter_scope(model)
    assert matched(model, scope) == find_targets(model, LoraConfig(target_modules="all-linear"))
    assert scope.target_modules == LLAMA_LINEARS
    assert scope.told == [
        "language model (the model): LoRA on 2 down_proj, 2 gate_proj, 2 k_proj, 2 o_proj, "
        "2 q_proj, 2 up_proj, 2 v_proj"
    ]
    assert model_parts(nn.Linear(2, 2)) == ModelParts(("",))


def test_the_true_8b_has_the_adapter_size_that_was_worked_out_by_hand():
    """Rank 16 on all matrices: 41.9 million parameters under the native names, 37.7 under the original's
    where queries, keys and values share a factor."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = {"vocab_size": 92553, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    tower = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    tower |= {"image_size": 448, "patch_size": 14}
    config = tiny_config(force_image_size=448)
    config["llm_config"] |= text
    config["vision_config"] |= tower
    native = native_config(config, 92546)
    assert native["image_seq_length"] == 256
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(**native))
    scope = adapter_scope(model)
    layers = [model.get_submodule(name) for name in matched(model, scope)]
    assert sum(16 * (layer.in_features + layer.out_features) for layer in layers) == 41_943_040
    assert sum(p.numel() for p in model.parameters()) == 8_075_365_376
