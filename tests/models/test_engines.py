"""The adapters that are saved and converted here, held to what vLLM and lmdeploy ask of them."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import randomise, tiny_llama
from engine_rules import check_lmdeploy, check_vllm, linear_names, lmdeploy_wqkv, read, vllm_names
from image_bases import write_original
from internvl_reference import tiny_config, tiny_tensors
from rankfold import LoraConfig, get_peft_model, load_base
from rankfold.models.adapters.convert import convert_adapter
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.internvl.groups import Groups

RANK = 2
# InternS1ForConditionalGeneration, which vLLM runs transformers' InternVL with:
# vllm/model_executor/models/interns1.py at 01dc287.  InternVLChatModel has no mapper (internvl.py).
NATIVE_MAPPER = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def adapted(model, folder, targets="all-linear", parts=("language",), **options):
    """An adapter as a run makes one, saved."""
    scope = adapter_scope(model, targets, parts).options()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **scope, **options)
    wrapped = get_peft_model(model, config)
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {language: write_original(root / language, language) for language in ("internlm2", "qwen2")}


def original_linears(language, *, of_language_model=False):
    """The linear modules of an original InternVL's language model, as vLLM and lmdeploy call them: both keep
    the checkpoint's names (vllm/model_executor/models/internvl.py and internlm2.py; lmdeploy/pytorch/models/
    internvl.py and internlm2.py), and packed matrices are known by their parts."""
    names = [
        key.removesuffix(".weight")
        for key, tensor in tiny_tensors(tiny_config(language)).items()
        if key.startswith("language_model.model.layers.") and key.endswith(".weight") and tensor.dim() == 2
    ]
    return [name.removeprefix("language_model.") for name in names] if of_language_model else names


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_text_adapter_is_what_both_engines_load(tmp_path, targets):
    model = tiny_llama()
    names = [name for name in linear_names(model) if "lm_head" not in name]
    folder = adapted(model, tmp_path / "a", targets)
    check_vllm(folder, names, {}, max_rank=RANK)
    check_lmdeploy(folder, names)


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_a_native_adapter_is_what_vllm_loads_for_transformers_internvl(bases, tmp_path, language):
    model = load_base(str(bases[language])).model
    names = [name for name in linear_names(model) if name.startswith("model.language_model.")]
    folder = adapted(model, tmp_path / "hf")
    theirs = [f"language_model.model.{name.removeprefix('model.language_model.')}" for name in names]
    check_vllm(folder, theirs, NATIVE_MAPPER, max_rank=RANK)
    assert isinstance(read(folder)[0]["target_modules"], list)
    assert set(vllm_names(read(folder)[1], NATIVE_MAPPER).values()) == set(theirs)


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_a_converted_adapter_is_what_vllm_loads_for_the_original_internvl(bases, tmp_path, language):
    adapted(load_base(str(bases[language])).model, tmp_path / "hf")
    convert_adapter(tmp_path / "hf", tmp_path / "original", "internvl", model=str(bases[language]))
    names = original_linears(language)
    # Queries, keys and values were trained apart: their matrix has three times the rank, and the same scale.
    check_vllm(tmp_path / "original", names, {}, max_rank=3 * RANK if language == "internlm2" else RANK)
    assert set(vllm_names(read(tmp_path / "original")[1], {}).values()) == set(names)


def test_a_converted_adapter_is_what_lmdeploy_loads_for_an_internvl_on_qwen2(bases, tmp_path):
    """Its loader looks through the whole model's parameters (InternLM/lmdeploy pull request 4684)."""
    adapted(load_base(str(bases["qwen2"])).model, tmp_path / "hf")
    convert_adapter(tmp_path / "hf", tmp_path / "original", "internvl", model=str(bases["qwen2"]))
    check_lmdeploy(tmp_path / "original", original_linears("qwen2"))


def test_one_rank_for_all_is_exact_and_what_lmdeploy_needs(bases, tmp_path):
    """InternLM2's loader looks through the language model's parameters only, so the names of the whole model
    are not found there: they are compared without their beginning, and the page says so."""
    base = bases["internlm2"]
    adapted(load_base(str(base)).model, tmp_path / "hf")
    own = convert_adapter(tmp_path / "hf", tmp_path / "own", "internvl", model=str(base))
    assert any("--common-rank 6" in line for line in own.told)
    done = convert_adapter(
        tmp_path / "hf", tmp_path / "one", "internvl", model=str(base), common_rank=3 * RANK
    )
    assert done.told[-1] == "exact"
    names = original_linears("internlm2")
    with pytest.raises(AssertionError):
        check_lmdeploy(tmp_path / "own", names)
    check_lmdeploy(tmp_path / "one", names)
    check_vllm(tmp_path / "one", names, {}, max_rank=3 * RANK)
    with pytest.raises(AssertionError, match="KeyError: language_model"):
        check_lmdeploy(tmp_path / "one", original_linears("internlm2", of_language_model=True))
    config, tensors = read(tmp_path / "one")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    before, wide = read(tmp_path / "own")[1], read(tmp_path / "one")
    for key in before:
        if key.endswith("lora_A.weight"):
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(wide[1][b] @ wide[1][key], before[b] @ before[key])
    assert tensors.keys() == before.keys()


def test_lmdeploys_order_of_the_fused_rows_is_ours():
    rows = torch.randn((4 + 2 * 2) * 8, 3)
    for ours, theirs in zip(Groups(4, 2, 8).split(rows), lmdeploy_wqkv(rows, 4, 2, 8), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_what_the_engines_refuse_is_seen_by_their_rules(bases, tmp_path, language):
    folder = adapted(load_base(str(bases[language])).model, tmp_path / "a", parts=("language", "projector"))
    names = linear_names(load_base(str(bases[language])).model)
    with pytest.raises(AssertionError, match="modules_to_save"):
        check_vllm(folder, names, {}, max_rank=RANK)
    scaled = adapted(
        load_base(str(bases[language])).model,
        tmp_path / "b",
        ["q_proj", "o_proj"],
        alpha_pattern={"o_proj": 9},
    )
    with pytest.raises(AssertionError, match="would have another scale"):
        check_vllm(scaled, names, {}, max_rank=RANK)
    config = json.loads((scaled / "adapter_config.json").read_text()) | {"target_modules": ".*q_proj"}
    (scaled / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="a pattern is taken for the set of its letters"):
        check_lmdeploy(scaled, names)
