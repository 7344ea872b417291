"""Adapters of InternVL in both layouts: what they compute is compared on the original's formulas."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomise, rankfold_command
from image_bases import write_original
from internvl_reference import IMAGE_TOKEN, Original, tiny_config, tiny_tensors
from rankfold import LoraConfig, PeftModel, get_peft_model, load_base, load_tuned
from rankfold.errors import AdapterError, ConfigError, ModelError, OutputError
from rankfold.models.adapters.convert import convert_adapter

LAYERS = [f"language_model.model.layers.{n}" for n in range(2)]
INTERNLM2 = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
QWEN2 = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of either language model in its original layout."""
    root = tmp_path_factory.mktemp("bases")
    return {language: write_original(root / language, language) for language in ("internlm2", "qwen2")}


def original_adapter(folder, base, modules, *, rank=3, alpha=6, seed=0, **config):
    """An adapter as InternVL's own users have it, with random factors; its tensors are returned too."""
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        rows, columns = weights[f"{name}.weight"].shape
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.2
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
        if config.get("use_dora"):
            norms = weights[f"{name}.weight"].norm(dim=1)
            tensors[f"{prefix}.lora_magnitude_vector"] = norms * (1 + torch.rand(rows, generator=generator))
    for name in config.get("modules_to_save") or ():
        for key in weights:
            if key.startswith(f"{name}."):
                value = weights[key] + torch.randn(weights[key].shape, generator=generator) * 0.1
                tensors[f"base_model.model.{key}"] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    endings = sorted({name.rpartition(".")[2] for name in modules})
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": endings,
        "base_model_name_or_path": str(base),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return tensors


def merged_original(base, adapter):
    """The original with an adapter of its own layout in it, read from the files and merged by hand."""
    weights = load_file(base / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        if name in weights:
            weights[name] = a
        if not key.endswith("lora_A.weight"):
            continue
        name = name.removesuffix(".lora_A.weight")
        rank = len(a)
        assert rank == config.get("rank_pattern", {}).get(name, config["r"])
        alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        whole = weights[f"{name}.weight"] + scale * tensors[key.replace("lora_A", "lora_B")] @ a
        bias = tensors.get(key.replace("lora_A.weight", "lora_B.bias"))
        if bias is not None:
            weights[f"{name}.bias"] = scale * bias
        magnitude = tensors.get(f"base_model.model.{name}.lora_magnitude_vector")
        if magnitude is not None:
            whole = whole * (magnitude / whole.norm(dim=1))[:, None]
        weights[f"{name}.weight"] = whole
    return Original(json.loads((base / "config.json").read_text()), weights)


def inputs():
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 290, (2, 12), generator=generator)
    ids[:, 3:7] = IMAGE_TOKEN
    return ids, torch.randn(2, 3, 28, 28, generator=generator)


def native_logits(base, adapter):
    model = PeftModel.from_pretrained(load_base(str(base)).model, adapter)
    ids, pixels = inputs()
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def assert_same(base, original, native, tolerance=3e-4):
    expected = merged_original(base, original).logits(*inputs())
    plain = Original(json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors"))
    assert not torch.allclose(expected, plain.logits(*inputs()), atol=1e-2)  # the adapter counts
    torch.testing.assert_close(native_logits(base, native), expected, rtol=tolerance, atol=tolerance)


CASES = {
    "every linear layer": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with the projector trained whole": {"modules_to_save": ["mlp1"]},
    "with the head trained whole": {"modules_to_save": ["output"]},
    "ranks and alphas of their own": {"alpha_pattern": {"wqkv": 12, "w1": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_the_original_computes_the_same_natively_and_comes_back(folders, tmp_path, case):
    base, config = folders["internlm2"], dict(CASES[case])
    if "modules_to_save" in config:
        config["modules_to_save"] = [
            {"output": "language_model.output"}.get(name, name) for name in config["modules_to_save"]
        ]
    modules = [f"{layer}.{name}" for layer in LAYERS for name in INTERNLM2]
    original = original_adapter(tmp_path / "original", base, modules, **config)
    told = convert_adapter(tmp_path / "original", tmp_path / "hf", "hf")
    assert "exact" in told.told[-1]
    # In the original's own spelling alpha_pattern's keys are endings; by hand they are spelt out.
    described = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    pattern = described.get("alpha_pattern", {})
    described["alpha_pattern"] = {m: pattern[e] for m in modules for e in pattern if m.endswith(e)}
    (tmp_path / "original" / "adapter_config.json").write_text(json.dumps(described))
    assert_same(base, tmp_path / "original", tmp_path / "hf")
    back = convert_adapter(tmp_path / "hf", tmp_path / "back", "internvl")
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    assert back.target_modules == ["w1", "w2", "w3", "wo", "wqkv"]
    assert_same(base, tmp_path / "back", tmp_path / "hf")


def test_peft_itself_loads_what_was_converted(folders, tmp_path):
    import peft

    modules = [f"{layer}.{name}" for layer in LAYERS for name in INTERNLM2]
    original_adapter(tmp_path / "original", folders["internlm2"], modules, modules_to_save=["mlp1"])
    convert_adapter(tmp_path / "original", tmp_path / "hf", "hf")
    model = load_base(str(folders["internlm2"])).model
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "hf"))
    with torch.no_grad():
        found = theirs(input_ids=inputs()[0], pixel_values=inputs()[1]).logits
    expected = merged_original(folders["internlm2"], tmp_path / "original").logits(*inputs())
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)


def test_the_tower_and_the_projector_are_translated_too(folders, tmp_path):
    base = folders["internlm2"]
    tower = [f"vision_model.encoder.layers.{n}" for n in range(3)]
    modules = [
        f"{layer}.{name}" for layer in tower for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    modules += ["mlp1.1", "mlp1.3"]
    original = original_adapter(tmp_path / "original", base, modules)
    described = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    described["target_modules"] = ["qkv", "attn.proj", "fc1", "fc2", "mlp1.1", "mlp1.3"]
    (tmp_path / "original" / "adapter_config.json").write_text(json.dumps(described))
    convert_adapter(tmp_path / "original", tmp_path / "hf", "hf")
    assert_same(base, tmp_path / "original", tmp_path / "hf")
    convert_adapter(tmp_path / "hf", tmp_path / "back", "internvl")
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert all(torch.equal(tensors[name], original[name]) for name in original)


def test_a_qwen2_based_adapter_changes_its_names_alone(folders, tmp_path):
    base = folders["qwen2"]
    modules = [f"{layer}.{name}" for layer in LAYERS for name in QWEN2]
    original = original_adapter(tmp_path / "original", base, modules)
    convert_adapter(tmp_path / "original", tmp_path / "hf", "hf")
    assert_same(base, tmp_path / "original", tmp_path / "hf")
    back = convert_adapter(tmp_path / "hf", tmp_path / "back", "internvl")
    assert back.told[-1] == "exact"
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in original)


def native_adapter(base, folder, **config):
    model = get_peft_model(load_base(str(base)).model, LoraConfig(**{"r": 2, "lora_alpha": 4, **config}))
    randomise(model)
    model.save_pretrained(folder)
    return folder


NATIVE = {
    "all of the language model": {"target_modules": r"model\.language_model.*_proj"},
    "queries and values": {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]},
    "queries alone": {"target_modules": ["self_attn.q_proj"]},
    "one layer": {"target_modules": ["model.language_model.layers.1.self_attn.k_proj"]},
    "ranks of their own": {
        "target_modules": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "down_proj"],
        "rank_pattern": {"k_proj": 3, "down_proj": 5},
        "alpha_pattern": {"v_proj": 9},
    },
    "rsLoRA": {"target_modules": ["self_attn.q_proj", "self_attn.k_proj"], "use_rslora": True},
    "DoRA": {"target_modules": r".*language_model.*_proj", "use_dora": True},
    "bias of B": {"target_modules": ["self_attn.q_proj", "self_attn.o_proj", "down_proj"], "lora_bias": True},
    "the tower": {"target_modules": ["attention.q_proj", "attention.v_proj"]},
    "projector whole": {"target_modules": ["o_proj"], "modules_to_save": ["multi_modal_projector"]},
    "head and embeddings": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("case", NATIVE)
def test_a_native_adapter_computes_the_same_in_the_original_by_stacking(folders, tmp_path, case):
    base = folders["internlm2"]
    native = native_adapter(base, tmp_path / "hf", **NATIVE[case])
    done = convert_adapter(native, tmp_path / "original", "internvl", model=str(base))
    assert done.told[-1] == "exact"
    assert all(isinstance(name, str) and not set(name) & set("*|\\(") for name in done.target_modules)
    if case == "head and embeddings":
        tensors = load_file(tmp_path / "original" / "adapter_model.safetensors")
        held = {key for key in tensors if ".base_layer." in key}  # PEFT saves adapted embeddings along
        assert {
            key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors.keys() - held
        } == {
            "language_model.model.tok_embeddings",
            "language_model.output",
            *(f"{layer}.attention.wo" for layer in LAYERS),
        }
    else:
        assert_same(base, tmp_path / "original", native)
    # And it comes back to the same logits.
    convert_adapter(tmp_path / "original", tmp_path / "again", "hf", model=str(base))
    torch.testing.assert_close(
        native_logits(base, tmp_path / "again"), native_logits(base, native), rtol=3e-4, atol=3e-4
    )


def test_a_common_rank_is_reached_by_svd_and_its_error_told(folders, tmp_path):
    base = folders["internlm2"]
    native = native_adapter(base, tmp_path / "hf", target_modules=r"model\.language_model.*_proj")
    exact = convert_adapter(native, tmp_path / "exact", "internvl", model=str(base))
    assert "2 fused matrices of rank 6" in exact.told
    done = convert_adapter(native, tmp_path / "near", "internvl", model=str(base), common_rank=2)
    assert "2 of them brought down to rank 2 by SVD" in done.told[-1]
    # Against a dense SVD of the update itself.
    stacks = {n: load_file(tmp_path / n / "adapter_model.safetensors") for n in ("exact", "near")}
    errors = []
    for layer in LAYERS:
        key = f"base_model.model.{layer}.attention.wqkv.lora_{{}}.weight"
        updates = {}
        for name, tensors in stacks.items():
            config = json.loads((tmp_path / name / "adapter_config.json").read_text())
            a, b = tensors[key.format("A")].double(), tensors[key.format("B")].double()
            alpha = config["alpha_pattern"].get(f"{layer}.attention.wqkv", config["lora_alpha"])
            updates[name] = alpha / len(a) * b @ a
        values = torch.linalg.svdvals(updates["exact"])
        lost = (updates["near"] - updates["exact"]).norm()
        torch.testing.assert_close(lost, values[2:].norm(), rtol=1e-4, atol=1e-6)
        errors.append(float(lost / updates["exact"].norm()))
    assert f"{sum(errors) / 2:.2e} on average, {max(errors):.2e} at most" in done.told[-1]
    assert json.loads((tmp_path / "near" / "adapter_config.json").read_text())["rank_pattern"] == {}


def test_what_rankfold_knows_of_an_adapter_goes_with_it(folders, tmp_path):
    base = folders["internlm2"]
    native = native_adapter(base, tmp_path / "hf", target_modules=["o_proj"])
    convert_adapter(native, tmp_path / "original", "internvl", model=str(base))
    convert_adapter(tmp_path / "original", tmp_path / "again", "hf", model=str(base))
    before, after = (json.loads((tmp_path / n / "rankfold.json").read_text()) for n in ("hf", "again"))
    assert before["base"] == after["base"]
    assert before["prompt_style"] == after["prompt_style"]
    assert (tmp_path / "hf" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "again" / "adapter_model.safetensors"
    ).read_bytes()


def test_what_cannot_be_translated_is_refused_by_name(folders, tmp_path, tiny_folder):
    base = folders["internlm2"]
    native = native_adapter(base, tmp_path / "hf", target_modules=["self_attn.q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match="DoRA on a part of a fused matrix"):
        convert_adapter(native, tmp_path / "out", "internvl", model=str(base))
    with pytest.raises(AdapterError, match="is in the layout 'hf' already"):
        convert_adapter(native, tmp_path / "out", "hf", model=str(base))
    with pytest.raises(ConfigError, match=r"no layout 'internlv' \(did you mean 'internvl'\?\)"):
        convert_adapter(native, tmp_path / "out", "internlv", model=str(base))
    with pytest.raises(ConfigError, match="common_rank must be at least 1"):
        convert_adapter(native, tmp_path / "out", "internvl", model=str(base), common_rank=0)
    with pytest.raises(ModelError, match="is no InternVL"):
        convert_adapter(native, tmp_path / "out", "internvl", model=str(tiny_folder))
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        convert_adapter(native, native, "internvl", model=str(base))
    config = json.loads((native / "adapter_config.json").read_text())
    config |= {"trainable_token_indices": [3], "init_lora_weights": "pissa", "use_dora": False}
    (native / "adapter_config.json").write_text(json.dumps(config))
    (native / "rankfold.json").unlink()
    with pytest.raises(AdapterError) as caught:
        convert_adapter(native, tmp_path / "out", "internvl", model=str(base))
    assert "trainable_token_indices" in str(caught.value)
    assert "'pissa', which changes the base" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_by_name(folders, tmp_path):
    base = folders["internlm2"]
    original_adapter(tmp_path / "a", base, [f"{LAYERS[0]}.attention.wqkv"])
    other = write_original(tmp_path / "other", llm__num_key_value_heads=4)
    with pytest.raises(AdapterError, match="attention.wqkv has 64 rows; the base has 96"):
        convert_adapter(tmp_path / "a", tmp_path / "out", "hf", model=str(other))
    qwen = [f"{LAYERS[0]}.self_attn.q_proj"]
    original_adapter(tmp_path / "b", folders["qwen2"], qwen)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    tensors["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 32)
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="mixes both layouts"):
        convert_adapter(tmp_path / "b", tmp_path / "out", "hf")
    del tensors["base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(
        {k: v for k, v in tensors.items() if "up_proj" not in k}, tmp_path / "b" / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="has lora_B.weight, and not both factors"):
        convert_adapter(tmp_path / "b", tmp_path / "out", "hf")


def test_an_adapter_under_the_originals_names_is_loaded_as_it_is(folders, tmp_path):
    base = folders["internlm2"]
    original_adapter(tmp_path / "original", base, [f"{layer}.attention.wqkv" for layer in LAYERS])
    tuned = load_tuned(tmp_path / "original")
    with torch.no_grad():
        found = tuned.model(input_ids=inputs()[0], pixel_values=inputs()[1]).logits
    expected = merged_original(base, tmp_path / "original").logits(*inputs())
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)


def test_the_command_says_what_it_did(folders, tmp_path):
    base = folders["internlm2"]
    native = native_adapter(base, tmp_path / "hf", target_modules=["self_attn.q_proj", "self_attn.v_proj"])
    words = ("--to", "internvl", "--model", base, "--prompts", "0", "--out", tmp_path / "out")
    done = rankfold_command("export", native, *words, "--common-rank", "3")
    assert done.returncode == 0, done.stderr
    assert "2 of them brought down to rank 3 by SVD: relative error" in done.stdout
    assert "target_modules: wqkv" in done.stdout
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    again = rankfold_command("export", native, *words)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")


def test_the_tiny_config_is_the_one_that_the_reference_reads():
    config = tiny_config()
    assert {*tiny_tensors(config)} >= {f"{layer}.{name}.weight" for layer in LAYERS for name in INTERNLM2}
