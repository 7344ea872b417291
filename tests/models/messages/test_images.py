from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import randomise, rankfold_command
from image_bases import noise, write_original
from rankfold import LoraConfig, get_peft_model, load_base, load_tuned
from rankfold.errors import DataError
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.processors import most_tiles, set_most_tiles
from rankfold.models.internvl.chat import SYSTEM_PROMPT
from rankfold.models.messages.images import SizedImage, image_prompt, image_reader

SIDE, TOKENS = 28, 4  # of a tile, in pixels and in image tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(write_original(tmp_path_factory.mktemp("internvl") / "base")))


@pytest.fixture
def reader(base):
    set_most_tiles(base.processor, 12)
    return image_reader(base.processor)


def grid(width: int, height: int, most: int) -> tuple[int, int]:
    """Columns and rows of tiles: InternVL's ``find_closest_aspect_ratio``, told a second time."""
    shapes = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most},
        key=lambda shape: (shape[0] * shape[1], shape),
    )
    best, nearest = (1, 1), math.inf
    for i, j in shapes:
        off = abs(width / height - i / j)
        if off < nearest or (off == nearest and width * height > 0.5 * SIDE * SIDE * i * j):
            best, nearest = (i, j), off
    return best


def tiles(picture: Image.Image, most: int) -> torch.Tensor:
    """InternVL's ``dynamic_preprocess`` with thumbnail, and ImageNet's normalisation."""
    columns, rows = grid(*picture.size, most)
    large = picture.resize((SIDE * columns, SIDE * rows), Image.Resampling.BICUBIC)
    cut = [
        large.crop((SIDE * c, SIDE * r, SIDE * (c + 1), SIDE * (r + 1)))
        for r in range(rows)
        for c in range(columns)
    ]
    if len(cut) > 1:
        cut.append(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    arrays = [(np.asarray(tile, dtype=np.float64) / 255 - mean) / std for tile in cut]
    return torch.tensor(np.stack(arrays).transpose(0, 3, 1, 2), dtype=torch.float32)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 220), height=st.integers(1, 220), most=st.sampled_from([1, 2, 6, 12]))
def test_an_image_is_cut_as_internvl_cuts_it(base, tmp_path_factory, width, height, most):
    set_most_tiles(base.processor, most)
    reader = image_reader(base.processor)
    path = noise(tmp_path_factory.getbasetemp() / "any.png", width, height)
    image = reader.look(path)
    expected = tiles(Image.open(path), most)
    torch.testing.assert_close(reader.pixels([image])["pixel_values"], expected, rtol=1e-4, atol=1e-4)
    text = reader.expansion(image)
    assert text == f"<img>{'<IMG_CONTEXT>' * TOKENS * len(expected)}</img>"


def test_a_prompt_is_that_of_internvl_byte_for_byte(base, reader, tmp_path):
    wide = noise(tmp_path / "wide.png", 90, 30)  # 3 tiles and a thumbnail
    small = noise(tmp_path / "small.png", 20, 20)
    part = {name: {"type": "image", "path": str(path)} for name, path in (("w", wide), ("s", small))}

    def text(words):
        return {"type": "text", "text": words}

    def written(*content):
        ids, inputs = image_prompt(base.processor, [{"role": "user", "content": list(content)}])
        start = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        whole = base.tokenizer.decode(ids)
        assert whole.startswith(start)
        assert whole.endswith("<|im_end|>\n<|im_start|>assistant\n")
        return whole[len(start) : -len("<|im_end|>\n<|im_start|>assistant\n")], inputs["pixel_values"]

    w, s = (f"<img>{'<IMG_CONTEXT>' * TOKENS * count}</img>" for count in (4, 1))
    found, pixels = written(part["w"], text("\nWhat is it?"))
    assert found == f"{w}\nWhat is it?"
    assert torch.equal(pixels, reader.pixels([reader.look(wide)])["pixel_values"])
    # Without a line feed of its own, an image at the beginning gets one, as InternVL's chat() does.
    assert written(part["s"], text("What is it?"))[0] == f"{s}\nWhat is it?"
    # One in the middle stays where it is; several are in their order, in the text and in the pixels.
    found, pixels = written(text("Is "), part["s"], text(" in "), part["w"], text("?"))
    assert found == f"Is {s} in {w}?"
    assert len(pixels) == 5
    assert torch.equal(pixels[:1], reader.pixels([reader.look(small)])["pixel_values"])
    assert written(part["s"], part["w"], text("\nCompare."))[0] == f"{s}\n{w}\nCompare."


def test_words_that_spell_image_tokens_stay_words(base, reader, tmp_path):
    path = noise(tmp_path / "small.png", 20, 20)
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": "\nWhat is <IMG_CONTEXT>?"}]
    ids, inputs = image_prompt(base.processor, [{"role": "user", "content": parts}])
    assert sum(i == base.model.config.image_token_id for i in ids) == TOKENS
    assert "What is <IMG_CONTEXT>?" in base.tokenizer.decode(ids)
    assert len(inputs["pixel_values"]) == 1


def test_a_prompt_without_images_is_the_one_of_a_text_model(base):
    from rankfold.models.messages.prompt import prompt_encoder

    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    ids, inputs = image_prompt(base.processor, messages)
    assert ids == prompt_encoder(base.tokenizer).prompt_ids(messages)
    assert inputs == {}
    assert base.tokenizer.decode(ids).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user")


def test_a_template_that_writes_its_own_line_feed_gets_no_second_one(base, reader, tmp_path):
    path = str(noise(tmp_path / "small.png", 20, 20))
    content = [{"type": "image", "path": path}, {"type": "text", "text": "\nWhat?"}]
    kept = base.tokenizer.chat_template
    try:
        for own, expected in (("\\n", "What?"), ("", "\nWhat?")):
            base.tokenizer.chat_template = (
                "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}"
                f"{{{{ '<IMG_CONTEXT>{own}' }}}}"
                "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
            )
            reader._doubles_newlines = None
            [tidy] = reader.tidied([{"role": "user", "content": content}])
            assert tidy["content"][1]["text"] == expected
    finally:
        base.tokenizer.chat_template = kept
        reader._doubles_newlines = None


def test_a_broken_missing_or_enormous_image_is_one_sentence(reader, tmp_path, monkeypatch):
    whole = noise(tmp_path / "whole.png", 40, 40).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.png", "words.png", "empty.jpg"):
        with pytest.raises(DataError, match=f"{name} is no image that can be read, or a broken one"):
            reader.look(tmp_path / name)
    with pytest.raises(DataError, match="no such image"):
        reader.look(tmp_path / "gone.png")
    for most in (1000, 500):  # a warning in Pillow, then an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(DataError, match="too large an image"):
            reader.look(tmp_path / "whole.png")


def test_an_image_that_changed_since_it_was_looked_at_is_told(reader, tmp_path):
    path = noise(tmp_path / "image.png", 40, 40)
    image = reader.look(path)
    noise(path, 80, 40)
    with pytest.raises(DataError, match="has changed from 40 x 40 to 80 x 40 pixels"):
        reader.pixels([image])


def test_a_template_that_leaves_an_image_out_is_told(reader, tmp_path):
    image = SizedImage(tmp_path / "a.png", 10, 10)
    with pytest.raises(DataError, match="writes 0 places for images, and the row has 1"):
        reader.expand("no mark", [image])


def test_every_colour_mode_is_read_as_rgb(reader, tmp_path):
    rgb = Image.open(noise(tmp_path / "rgb.png", 30, 30))
    for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tiff"
        (Image.new("I;16", (30, 30), 7) if mode == "I;16" else rgb.convert(mode)).save(path)
        assert reader.pixels([reader.look(path)])["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_another_count_of_tiles_is_another_reader(base, tmp_path):
    image = SizedImage(noise(tmp_path / "wide.png", 90, 30), 90, 30)
    for most, tokens in ((12, 16), (2, 12), (1, 4)):
        set_most_tiles(base.processor, most)
        reader = image_reader(base.processor)
        assert reader.tiles == most
        assert reader.expansion(image).count("<IMG_CONTEXT>") == tokens


def test_an_adapter_carries_its_count_of_tiles_into_every_conversation(tmp_path):
    folder = str(write_original(tmp_path / "base"))
    base = load_base(folder)
    model = get_peft_model(base.model, LoraConfig(r=2, **adapter_scope(base.model).options()))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", facts={"image_tiles": 2})
    tuned = load_tuned(tmp_path / "adapter", folder)
    assert most_tiles(tuned.processor) == 2
    assert most_tiles(load_base(folder).processor) == 12


def test_a_model_answers_to_images_and_a_text_model_refuses_them(base, tmp_path, real_base):
    set_most_tiles(base.processor, 12)
    path = str(noise(tmp_path / "wide.png", 90, 30))
    content = [{"type": "image", "path": path}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    answer = reply(base, messages, Sampling(max_new_tokens=3, temperature=0))
    ids, inputs = image_prompt(base.processor, messages)
    expected = base.model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=291, **inputs
    )
    assert (
        answer
        == base.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True).rstrip("\ufffd").strip()
    )
    with pytest.raises(DataError, match="this model cannot see them"):
        reply(real_base, messages, Sampling(max_new_tokens=3, temperature=0))


def test_the_command_shows_images(tmp_path):
    folder = write_original(tmp_path / "base")
    small = noise(tmp_path / "small.png", 20, 20)
    words = ("generate", "--model", folder, "--prompt", "What?", "--max-new-tokens", "2", "--image")
    done = rankfold_command(*words, small)
    assert done.returncode == 0, done.stderr
    failed = rankfold_command(*words, tmp_path / "gone.png")
    assert (failed.returncode, failed.stderr) == (2, f"error: no such image: {tmp_path / 'gone.png'}\n")


@pytest.mark.slow
def test_a_chat_shows_images_with_the_next_message(tmp_path):
    folder = write_original(tmp_path / "base")
    base = load_base(str(folder))
    model = get_peft_model(base.model, LoraConfig(r=8, lora_alpha=64, **adapter_scope(base.model).options()))
    randomise(model)  # otherwise an answer hangs on its last token alone
    model.save_pretrained(tmp_path / "adapter")
    small = noise(tmp_path / "small one.png", 20, 20)
    options = (
        "--model",
        folder,
        "--adapter",
        tmp_path / "adapter",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
    )

    def said(*command, lines=None):
        done = rankfold_command(*command, *options, input=lines)
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("\ufffd", " ").split()

    with_image = said("generate", "--prompt", "What?", "--image", small)
    without = said("generate", "--prompt", "What?")
    assert with_image != without
    assert said("chat", lines=f"/image {small}\nWhat?\n") == with_image
    assert said("chat", lines=f"/image {small}\n/reset\nWhat?\n") == without


@pytest.mark.parametrize(
    ("line", "told"),
    [("/image gone.png", "no such image: gone.png"), ("/image", "/image wants the file of an image")],
)
def test_a_chat_that_is_piped_in_ends_at_an_image_that_is_none(tmp_path, line, told):
    folder = write_original(tmp_path / "base")
    chat = rankfold_command("chat", "--model", folder, "--max-new-tokens", "3", input=f"{line}\nWhat?\n")
    assert (chat.returncode, chat.stdout, chat.stderr) == (2, "", f"error: {told}\n")


def test_a_chat_with_a_model_of_words_takes_no_image(tmp_path):
    chat = rankfold_command("chat", input=f"/image {noise(tmp_path / 'a.png', 20, 20)}\n")
    assert chat.returncode == 2
    assert "cannot see images" in chat.stderr
