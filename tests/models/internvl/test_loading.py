from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from image_bases import CHATML, byte_tokenizer, noise, write_original
from internvl_reference import Original, tiny_config, tiny_tensors
from rankfold import load_base
from rankfold.errors import ModelError
from rankfold.models.base.precision import Precision
from rankfold.models.base.processors import most_tiles, set_most_tiles
from rankfold.models.base.text_side import load_text


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_an_original_folder_is_loaded_without_its_code(tmp_path, language):
    folder = write_original(tmp_path / "base", language)
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code was run')")
    base = load_base(str(folder))
    assert type(base.model).__name__ == "InternVLForConditionalGeneration"
    assert base.model.name_or_path == str(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    config = tiny_config(language)
    expected = Original(config, tiny_tensors(config)).logits(ids)
    with torch.no_grad():  # text alone, as every text run calls it
        found = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert base.processor.tokenizer is base.tokenizer
    assert load_text(str(folder))[0].get_vocab() == base.tokenizer.get_vocab()
    assert load_text(str(folder))[2] == 4096


def test_a_native_folder_is_loaded_with_its_processor(tmp_path):
    original = load_base(str(write_original(tmp_path / "original")))
    original.model.save_pretrained(tmp_path / "hf")
    original.processor.save_pretrained(tmp_path / "hf")
    base = load_base(str(tmp_path / "hf"))
    theirs, ours = original.model.state_dict(), base.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert base.processor.image_processor.to_dict() == original.processor.image_processor.to_dict()
    assert base.tokenizer.chat_template == original.tokenizer.chat_template
    assert most_tiles(base.processor) == 12
    assert base.notes == []


def test_a_template_without_the_system_prompt_is_told(tmp_path):
    original = load_base(str(write_original(tmp_path / "original")))
    original.model.save_pretrained(tmp_path / "hf")
    original.processor.chat_template = original.tokenizer.chat_template = CHATML
    original.processor.save_pretrained(tmp_path / "hf")
    [note] = load_base(str(tmp_path / "hf")).notes
    assert "has no system prompt of its own" in note


def test_weights_in_several_files_are_read_in_all_of_them(tmp_path):
    folder = write_original(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load_base(str(folder)).model.num_parameters() == sum(t.numel() for t in tensors.values())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks its weights: b\.safetensors"):
        load_base(str(folder))


def test_weights_that_do_not_fit_their_config_are_named(tmp_path):
    folder = write_original(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    gone, wrong = "mlp1.3.bias", "language_model.model.layers.0.feed_forward.w1.weight"
    del tensors[gone]
    tensors[wrong] = torch.zeros(7, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_base(str(folder))
    assert "multi_modal_projector.linear_2.bias" in str(caught.value)
    assert "layers.0.mlp.gate_proj.weight" in str(caught.value)


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    folder = write_original(tmp_path / "base")
    byte_tokenizer({290: "<|im_start|>", 291: "<|im_end|>"}).save_pretrained(folder)
    with pytest.raises(ModelError, match="lacks InternVL's tokens <img>, </img>, <IMG_CONTEXT>$"):
        load_base(str(folder))


def test_the_config_says_into_how_many_tiles_an_image_is_cut(tmp_path):
    from PIL import Image

    still = load_base(str(write_original(tmp_path / "still", dynamic_image_size=False)))
    tiled = load_base(str(write_original(tmp_path / "tiled", max_dynamic_patch=6)))
    image = Image.open(noise(tmp_path / "wide.png", 200, 70))
    for base, most, tiles in ((still, 1, 1), (tiled, 6, 4)):
        assert most_tiles(base.processor) == most
        read = base.processor(text="<IMG_CONTEXT>", images=[image], return_tensors="pt")
        assert read["pixel_values"].shape == (tiles, 3, 28, 28)
    set_most_tiles(tiled.processor, 1)
    read = tiled.processor(text="<IMG_CONTEXT>", images=[image], return_tensors="pt")
    assert read["pixel_values"].shape == (1, 3, 28, 28)


def test_only_a_processor_of_tiles_has_a_count_of_them(real_base):
    assert most_tiles(real_base.tokenizer) is None
    with pytest.raises(ModelError, match="does not cut images into tiles"):
        set_most_tiles(real_base.tokenizer, 3)


def test_a_base_is_held_in_the_precision_asked_for_and_its_angles_stay_exact(tmp_path):
    folder = write_original(tmp_path / "base", torch_dtype="bfloat16")
    wide = load_base(str(folder), Precision.of("float32"))
    narrow = load_base(str(folder), Precision.of("bfloat16"))
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    assert any("come as bfloat16 and are held as float32" in note for note in wide.notes)
    assert narrow.notes == []
    angles = [base.model.model.language_model.rotary_emb.inv_freq for base in (wide, narrow)]
    assert torch.equal(*angles)
    assert narrow.model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
