"""Rows with images: which tokens they become, which of them are trained, and their pixels in a batch."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as Pillow

from conftest import labelled
from image_bases import noise, write_original
from internvl_reference import IMAGE_TOKEN
from rankfold import LoraConfig, get_peft_model, load_base, load_tuned
from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.order.batching import PaddedImages
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.tokens.cache import encode_cached
from rankfold.data.tokens.encode import IGNORE, Encoding, encode, encode_all, marked_pieces
from rankfold.errors import DataError
from rankfold.models.adapters.modalities import adapter_scope
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.internvl.chat import SYSTEM_PROMPT
from rankfold.models.messages.images import image_reader

PER_TILE = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(write_original(tmp_path_factory.mktemp("internvl") / "base")))


@pytest.fixture
def reader(base):
    return image_reader(base.processor)


@pytest.fixture
def images(tmp_path):
    """A wide image (3 tiles and a thumbnail) and a small one (1 tile)."""
    return Image(noise(tmp_path / "wide.png", 90, 30)), Image(noise(tmp_path / "small.png", 20, 20))


def talk(*turns, origin="rows.jsonl:3"):
    roles = ("user", "assistant")
    messages = [
        Message(roles[n % 2], turn if isinstance(turn, tuple) else (turn,)) for n, turn in enumerate(turns)
    ]
    return Example(origin, tuple(messages))


def pictured(tiles):
    return f"<img>{'<IMG_CONTEXT>' * PER_TILE * tiles}</img>"


def test_a_row_is_internvls_own_text_and_only_the_answer_and_its_end_are_trained(base, reader, images):
    wide, small = images
    example = talk((wide, "\nWhat is it?"), "A cat.", ("And ", small, "?"), "A dog.")
    row = encode(example, base.tokenizer, reader=reader)
    # preprocess_internvl2_5 joins these; its last line feed is not trained, and here not there.
    expected = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\n{pictured(4)}\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nAnd {pictured(1)}?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>"
    )
    assert row.input_ids == base.tokenizer(expected, add_special_tokens=False).input_ids
    trained = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE]
    assert base.tokenizer.decode(trained) == "A cat.<|im_end|>A dog.<|im_end|>"
    assert [(image.path, image.width) for image in row.images] == [(wide.path, 90), (small.path, 20)]


def test_no_image_token_is_trained_even_when_everything_is(base, reader, images):
    row = encode(talk((images[0], "\nWhat?"), "A cat."), base.tokenizer, "all", reader)
    untrained = {i for i, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE}
    names = base.tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"])
    assert untrained == {*names, row.input_ids[0]}
    assert row.labels.count(IGNORE) == 1 + PER_TILE * 4 + 2


def test_text_rows_are_what_they_are_without_a_reader(base, reader):
    example = talk("Hello", "Good day.")
    assert encode(example, base.tokenizer, reader=reader) == encode(example, base.tokenizer)
    running = Example("rows.txt:1", text="Once upon a time")
    assert encode(running, base.tokenizer, reader=reader) == encode(running, base.tokenizer)


def test_a_batch_gives_the_logits_that_its_rows_give_alone(base, reader, images):
    wide, small = images
    examples = [
        talk((wide, "\nWhat?"), "A cat."),
        talk("Hello", "Good day."),
        talk((small, "\nAnd ", wide, "?"), "Both."),
    ]
    rows = [encode(example, base.tokenizer, reader=reader) for example in examples]
    batch = PaddedImages(reader=reader).collate(rows, 291, "cpu")
    assert batch.inputs["pixel_values"].shape == (4 + 1 + 4, 3, 28, 28)
    labels = labelled(rows)["labels"]
    with torch.no_grad():
        together = base.model(**batch.inputs).logits
        for place, row in enumerate(rows):
            alone = PaddedImages(reader=reader).collate([row], 291, "cpu")
            torch.testing.assert_close(
                together[place, : len(row)], base.model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-5
            )
    assert (labels[0, len(rows[0]) :] == IGNORE).all()
    assert int((batch.inputs["input_ids"] == IMAGE_TOKEN).sum()) == PER_TILE * 9


def test_a_batch_of_text_rows_has_no_pixels(base, reader):
    rows = [encode(talk("Hello", "Good day."), base.tokenizer)]
    batch = PaddedImages(reader=reader).collate(rows, 291, "cpu")
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}


def test_a_broken_image_is_named_with_its_row(base, reader, images, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(images[0].path.read_bytes()[:300])
    rows = [
        talk((images[0], "\nWhat?"), "A cat."),
        talk((Image(path), "\nWhat?"), "?", origin="rows.jsonl:9"),
    ]
    with pytest.raises(
        DataError, match=r"1 rows cannot be encoded:\n.*rows.jsonl:9: .*broken.png is no image"
    ):
        encode_all(rows, base.tokenizer, 1000, reader=reader)


def test_an_image_that_went_away_after_the_rows_were_read_is_named_with_its_row(base, reader, images):
    row = encode(talk((images[0], "\nWhat?"), "A cat."), base.tokenizer, reader=reader)
    images[0].path.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl:3: no such image: .*wide.png"):
        PaddedImages(reader=reader).collate([row], 291, "cpu")


def test_a_row_that_is_too_long_is_left_out_whole_and_told(base, reader, images):
    examples = [talk((images[0], "\nWhat?"), "A cat."), talk("Hello", "Good day.")]
    whole = encode(examples[0], base.tokenizer, reader=reader)
    rows, over = encode_all(examples, base.tokenizer, len(whole) - 1, reader=reader)
    assert [row.images for row in rows] == [()]
    assert over == [
        f"rows.jsonl:3 has {len(whole):,} tokens with those of its 1 images, more than {len(whole) - 1:,}"
    ]


def test_a_text_model_refuses_images_and_no_model_is_taught_to_draw(base, reader, images):
    example = talk((images[0], "\nWhat?"), "A cat.")
    with pytest.raises(DataError, match="a text model cannot read them"):
        encode(example, base.tokenizer)
    drawn = talk("Draw a cat.", (images[0], "There."))
    with pytest.raises(DataError, match="an assistant's turn holds an image"):
        encode(drawn, base.tokenizer, reader=reader)


def test_a_conversation_that_becomes_several_rows_has_in_each_the_images_before_its_answer(
    base, reader, images
):
    """A template that forgets the thoughts of earlier turns begins a row anew for every turn."""
    kept = base.tokenizer.chat_template
    base.tokenizer.chat_template = (
        "{%- for message in messages -%}<|im_start|>{%- if message.content is string -%}"
        "{{ message.reasoning_content if loop.last and message.reasoning_content }}{{ message.content }}"
        "{%- else -%}{%- for part in message.content -%}"
        "{{ '<IMG_CONTEXT>' if part.type == 'image' else part.text }}"
        "{%- endfor -%}{%- endif -%}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
    )
    try:
        turns = talk((images[0], "One"), "A cat.", (images[1], "Two"), "A dog.").messages
        thinking = tuple(
            Message(turn.role, turn.parts, reasoning="Hm. " if turn.role == "assistant" else "")
            for turn in turns
        )
        rows, _ = encode_all([Example("rows.jsonl:3", thinking)], base.tokenizer, 1000, reader=reader)
    finally:
        base.tokenizer.chat_template = kept
    assert [[image.path.name for image in row.images] for row in rows] == [
        ["wide.png"],
        ["wide.png", "small.png"],
    ]
    assert [row.input_ids.count(IMAGE_TOKEN) for row in rows] == [PER_TILE * 4, PER_TILE * 5]


def test_the_proof_of_the_mask_folds_an_images_tokens(base, reader, images):
    row = encode(talk((images[0], "\nWhat?"), "A cat."), base.tokenizer, reader=reader)
    pieces = marked_pieces(row, base.tokenizer)
    assert [trained for _, trained in pieces] == [False, True]
    assert "<|im_start|>user\n<img><IMG_CONTEXT> x 16 </img>\nWhat?" in pieces[0][0]


def test_the_doctor_counts_the_tokens_of_images_and_finds_broken_ones(tmp_path, write_rows, images):
    folder = write_original(tmp_path / "base")
    row = {"prompt": "<image>\nWhat?", "completion": "A cat.", "images": [str(images[0].path)]}
    path = write_rows([row, {"prompt": "Hello", "completion": "Good day."}])
    report = check(CheckRequest.of({"data": str(path), "model": str(folder)}))
    assert report.status == 0, report.verdict
    base = load_base(str(folder))
    example = talk((images[0], "\nWhat?"), "A cat.")
    assert report.lengths.longest == len(encode(example, base.tokenizer, reader=image_reader(base.processor)))
    images[0].path.write_bytes(b"no image")
    report = check(CheckRequest.of({"data": str(path), "model": str(folder)}))
    assert report.status == 1
    assert "1 of 2 rows cannot be used" in report.verdict
    [finding] = [finding for finding in report.findings if finding.stops]
    assert "wide.png is no image that can be read" in str(finding)


def test_rows_with_images_are_not_kept_in_the_cache(images, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rankfold.data.tokens.cache.LEAST_ROWS", 1)
    example = talk((images[0], "\nWhat?"), "A cat.")
    base = load_base(str(write_original(tmp_path / "base")))
    encoding = Encoding([example], base.tokenizer, 4096, reader=image_reader(base.processor))
    rows, left_out = encode_cached(encoding, [example], {})
    assert (rows, left_out) == (list(encoding), [])
    assert not (tmp_path / "cache").exists()


def test_what_is_in_the_image_can_be_learnt(tmp_path):
    """Two rows that differ in nothing but their image's colour: without seeing it, none can answer both."""
    base = load_base(str(write_original(tmp_path / "base")))
    reader = image_reader(base.processor)
    rows, asked = [], {}
    for colour, answer in (("black", "Night"), ("white", "Day")):
        path = tmp_path / f"{colour}.png"
        Pillow.new("RGB", (40, 40), colour).save(path)
        turns = talk((Image(path), "\nWhat?"), answer).messages
        example = Example(f"rows.jsonl:{colour}", (Message("system", ("See.",)), *turns))
        rows.append(encode(example, base.tokenizer, reader=reader))
        asked[answer] = example.prompt
    scope = adapter_scope(base.model, train=["language", "projector"])
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=8, lora_alpha=16, **scope.options())).train()
    batch = PaddedImages(reader=reader).collate(rows, 291, "cpu")
    labels = labelled(rows)["labels"][:, 1:]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        logits = model(**batch.inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(tmp_path / "adapter", facts={"image_tiles": reader.tiles})
    tuned = load_tuned(tmp_path / "adapter", str(tmp_path / "base"))
    greedy = Sampling(temperature=0, max_new_tokens=10)
    assert {answer: reply(tuned, prompt, greedy) for answer, prompt in asked.items()} == {
        answer: answer for answer in asked
    }
