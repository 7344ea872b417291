"""Models that see images, with the weights of their language model held in few bytes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import randomise
from image_bases import write_original
from image_models import tiny_image_model
from internvl_reference import IMAGE_TOKEN
from rankfold import LoraConfig, PeftModel, get_peft_model, load_base
from rankfold.errors import ModelError
from rankfold.lora.layers.quantised import is_quantised
from rankfold.models.adapters.modalities import model_parts
from rankfold.models.base.packed import Stored
from rankfold.storage.layers import held_layers

LIMITS: dict[Stored, float] = {"bfloat16": 0.02, "int8": 0.05, "q4_0": 0.6, "nf4": 0.6}
LAYERS, LINEARS = 2, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """InternVL of either language model: original, as transformers writes it, and by its older names."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    for language in ("internlm2", "qwen2"):
        first = write_original(root / language, language, llm__intermediate_size=64)
        base = load_base(str(first))
        native, older = root / f"{language}-native", root / f"{language}-older"
        base.model.save_pretrained(native)
        base.processor.save_pretrained(native)
        shutil.copytree(native, older)
        tensors = base.model.state_dict()
        renamed = {
            name.replace("model.language_model.", "language_model.model."): t for name, t in tensors.items()
        }
        renamed = {name.removeprefix("model."): t for name, t in renamed.items()}
        renamed = {
            "language_model.lm_head.weight" if n == "lm_head.weight" else n: t for n, t in renamed.items()
        }
        save_file({n: t.contiguous() for n, t in renamed.items()}, older / "model.safetensors")
        found |= {(language, "original"): first, (language, "native"): native, (language, "older"): older}
    return found


def inputs():
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 290, (2, 12), generator=draw)
    ids[:, 3:7] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=draw)}


@pytest.mark.parametrize("written", ["original", "native", "older"])
@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
@pytest.mark.parametrize("stored", LIMITS)
def test_the_language_model_alone_is_held_and_computes_nearly_the_same(folders, stored, language, written):
    name = str(folders[language, written])
    plain, base = load_base(name), load_base(name, stored=stored)
    parts = model_parts(base.model)
    layers = [*held_layers(base.model), *(n for n, m in base.model.named_modules() if is_quantised(m))]
    assert len(layers) == LAYERS * LINEARS + 2  # and embeddings and head
    assert {parts.part_of(path) for path in layers} == {"language", None}
    tower = [
        m for n, m in base.model.named_modules() if parts.part_of(n) == "vision" and isinstance(m, nn.Linear)
    ]
    assert {type(layer) for layer in tower} == {nn.Linear}
    assert base.notes[0].startswith(f"{len(layers)} weights are held in")
    if stored == "nf4":
        assert sum(map(is_quantised, base.model.modules())) == LAYERS * LINEARS
    with torch.no_grad():
        expected, found = (b.model(**inputs()).logits for b in (plain, base))
    assert float((found - expected).norm() / expected.norm()) < LIMITS[stored]
    assert base.model.generation_config.eos_token_id == plain.model.generation_config.eos_token_id
    assert base.processor is not None


@pytest.mark.parametrize("stored", LIMITS)
def test_an_adapter_trained_on_it_has_gradients_and_fits_the_plain_base(folders, stored, tmp_path):
    name = str(folders["internlm2", "original"])
    model = get_peft_model(
        load_base(name, stored=stored).model,
        LoraConfig(r=2, target_modules=r"model\.language_model.*_proj", task_type="CAUSAL_LM"),
    ).train()
    randomise(model)
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * LAYERS * LINEARS
    assert all(g is not None and g.any() for g in gradients.values())
    with torch.no_grad():
        held = model.eval()(**batch).logits
        model.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(load_base(name).model, tmp_path).eval()(**batch).logits
    assert float((held - plain).norm() / plain.norm()) < LIMITS[stored]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "idefics3"])
def test_other_families_are_held_too(family, tmp_path):
    model, processor = tiny_image_model(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), stored="int8")
    parts = model_parts(base.model)
    assert {parts.part_of(path) for path in held_layers(base.model)} <= {"language", None}
    assert len(held_layers(base.model)) >= LAYERS * LINEARS
    ids = torch.arange(2, 14).view(1, 12)
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, base.model(input_ids=ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_blocks_of_a_gguf_file_are_not_to_be_had_from_a_folder(folders):
    with pytest.raises(ModelError, match=r"is no GGUF file; stored='q4_0' rounds to such blocks"):
        load_base(str(folders["qwen2", "native"]), stored="gguf")


def test_what_the_files_lack_is_listed_by_name(folders, tmp_path):
    shutil.copytree(folders["internlm2", "original"], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["language_model.model.layers.1.attention.wqkv.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.weight is missing"):
        load_base(str(tmp_path / "a"), stored="int8")
    save_file(tensors | {"language_model.extra": torch.ones(2)}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ModelError, match=r"no place in an InternVL:\s+- language_model.extra \(2,\)"):
        load_base(str(tmp_path / "a"), stored="int8")
    save_file(
        load_file(folders["internlm2", "original"] / "model.safetensors"),
        tmp_path / "a" / "model.safetensors",
    )
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["llm_config"]["num_key_value_heads"] = 4
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"attention.wqkv.weight has 64 rows; the config says 96"):
        load_base(str(tmp_path / "a"), stored="int8")
