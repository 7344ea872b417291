"""Other image-text models of transformers take the same path as InternVL, by their own processors."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as Pillow

from conftest import labelled
from image_bases import noise
from image_models import tiny_image_model
from rankfold import LoraConfig, get_peft_model, load_base
from rankfold.data.order.batching import PaddedImages
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.tokens.encode import IGNORE, encode
from rankfold.digits.assemble import Tower, assemble
from rankfold.errors import ModelError
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.answering.answers import replies, reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.processors import load_processor, most_tiles, sees_images, without_video
from rankfold.models.base.text_side import load_text
from rankfold.models.messages.images import image_prompt, image_reader

WITH_PROCESSOR = ("qwen2_5_vl", "llava", "gemma3", "idefics3")


@pytest.fixture(scope="module", params=WITH_PROCESSOR)
def family(request):
    model, processor = tiny_image_model(request.param)
    return request.param, model, processor


@pytest.fixture
def images(tmp_path):
    return Image(noise(tmp_path / "wide.png", 90, 60)), Image(noise(tmp_path / "small.png", 40, 56, seed=1))


def rows_of(images):
    wide, small = images
    asked = {
        "one image": (wide, "What?"),
        "none": ("Hello",),
        "two images": ("A ", small, " and a ", wide, "?"),
    }
    return [
        Example(f"rows.jsonl:{place}", (Message("user", parts), Message("assistant", ("It is.",))))
        for place, parts in enumerate(asked.values())
    ]


def theirs(processor, example):
    """The processor's own reading of a row: its template, its placeholders, its pixels."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in example.messages[0].parts
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is."}]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    pictures = [Pillow.open(image.path).convert("RGB") for image in example.messages[0].images]
    return processor(text=[text], images=pictures or None, return_tensors="pt")


def test_a_row_has_the_tokens_and_pixels_that_the_processor_gives_it(family, images):
    name, _, processor = family
    reader = image_reader(processor)
    for example in rows_of(images):
        expected = theirs(processor, example)
        row = encode(example, processor.tokenizer, reader=reader)
        assert [*row.input_ids, *processor.tokenizer("\n").input_ids] == expected["input_ids"][0].tolist()
        batch = PaddedImages(reader=reader).collate([row], 291, "cpu")
        own = {key: value for key, value in expected.items() if key not in ("input_ids", "attention_mask")}
        assert batch.inputs.keys() - {"input_ids", "attention_mask"} == own.keys() | (
            {reader.type_name} - {""}
        )
        for key in own.keys() & batch.inputs.keys():
            cut = own[key][:, : len(row)] if key == reader.type_name else own[key]
            assert torch.equal(batch.inputs[key], cut), (name, key)
        trained = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE]
        assert processor.tokenizer.decode(trained) == "It is.<|im_end|>"


def test_a_batch_gives_the_logits_of_its_rows_and_trains_the_language_model_alone(family, images):
    name, _, processor = family
    model, _ = tiny_image_model(name)
    reader = image_reader(processor)
    rows = [encode(example, processor.tokenizer, reader=reader) for example in rows_of(images)]
    batch = PaddedImages(reader=reader).collate(rows, 291, "cpu")
    labels = labelled(rows)["labels"]
    with torch.no_grad():
        together = model(**batch.inputs).logits
        for place, row in enumerate(rows):
            alone = PaddedImages(reader=reader).collate([row], 291, "cpu")
            torch.testing.assert_close(
                together[place, : len(row)], model(**alone.inputs).logits[0], rtol=1e-3, atol=1e-4
            )
    wrapped = get_peft_model(model, LoraConfig(r=2, **adapter_scope(model).options()))
    before = {path: p.detach().clone() for path, p in wrapped.named_parameters()}
    optimiser = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    logits = wrapped.train()(**batch.inputs).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    ).backward()
    optimiser.step()
    changed = {path for path, p in wrapped.named_parameters() if not torch.equal(p, before[path])}
    assert changed
    assert all("lora_B" in path and "vision" not in path and "visual" not in path for path in changed)


def test_a_prompt_to_be_answered_is_the_beginning_of_the_row(family, images):
    _, model, processor = family
    reader = image_reader(processor)
    example = rows_of(images)[2]
    ids, inputs = image_prompt(processor, example.prompt)
    row = encode(example, processor.tokenizer, reader=reader)
    assert row.input_ids[: len(ids)] == ids
    tokens = torch.tensor([ids])
    answer = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=2,
        do_sample=False,
        **inputs,
    )
    assert answer.shape[1] > len(ids)


def test_text_alone_needs_no_pixels(family):
    _, model, _ = family
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3, 320)


def test_a_folder_is_loaded_with_its_processor(family, tmp_path):
    name, model, processor = family
    if name in ("gemma3", "llava"):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        base = load_base(str(tmp_path))
        assert type(base.processor).__name__ == type(processor).__name__
        assert base.tokenizer is base.processor.tokenizer
        assert image_reader(base.processor).image_ids == image_reader(processor).image_ids
        assert load_text(str(tmp_path))[2] == 512
    assert sees_images(model.config)
    assert most_tiles(processor) is None


def test_a_processor_that_lacks_a_package_says_which(tmp_path):
    model, _ = tiny_image_model("smolvlm")
    _, processor = tiny_image_model("idefics3")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = tmp_path / "processor_config.json"
    config.write_text(config.read_text().replace("Idefics3", "SmolVLM"))
    with pytest.raises(ModelError, match="num2words"):
        load_base(str(tmp_path))


def test_a_model_without_a_processor_of_transformers_is_refused(tmp_path, tiny_folder):
    from transformers import AutoConfig

    with pytest.raises(ModelError, match="no processor for a model of type 'llama'"):
        load_processor(tiny_folder, AutoConfig.from_pretrained(tiny_folder))


def test_a_processor_without_a_video_part_is_the_class_itself(family):
    _, _, processor = family
    assert without_video(type(processor)) is type(processor)


def test_a_processor_without_its_video_part_keeps_the_settings_of_its_file(tmp_path, assembled_internvl):
    """transformers takes the names of settings from the code of ``__init__``, which is another one here."""
    processor = load_base(str(assembled_internvl)).processor
    assert processor.image_seq_length == 4
    processor.save_pretrained(tmp_path)
    assert "video" not in (tmp_path / "processor_config.json").read_text()


@pytest.fixture
def assembled_internvl(tiny_folder, tmp_path):
    tower = Tower(width=16, layers=1, heads=2, patch_side=8)
    assemble(load_base(str(tiny_folder)), tower, tmp_path / "internvl", seed=0)
    return tmp_path / "internvl"


def test_many_answers_at_once_are_those_given_one_by_one(assembled_internvl, images):
    base = load_base(str(assembled_internvl))
    asked = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "path": str(image.path)}, {"type": "text", "text": t}],
            }
        ]
        for image in images
        for t in ("What?", "Who is that?", "What?")
    ]
    asked += [[{"role": "user", "content": "Hello."}]]
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    assert replies(base, asked, sampling) == [reply(base, each, sampling) for each in asked]
    assert replies(base, [], sampling) == []
