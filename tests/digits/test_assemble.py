from __future__ import annotations

import pytest
import torch

from rankfold.digits.assemble import Tower, assemble
from rankfold.models.base.load import load_base
from rankfold.models.base.text_side import load_text
from rankfold.models.messages.images import image_reader

TINY = Tower(width=16, layers=1, heads=2, patch_side=8)


@pytest.fixture(scope="module")
def assembled(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled") / "model"
    assemble(load_base(str(tiny_folder)), TINY, folder, seed=0)
    return folder


def test_it_is_an_ordinary_model_folder(assembled):
    base = load_base(str(assembled))
    assert type(base.model).__name__ == "InternVLForConditionalGeneration"
    assert {path.name for path in assembled.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
    }
    reader = image_reader(base.processor)
    assert reader.tiles == 1
    assert load_text(str(assembled))[1].image_seq_length == TINY.image_tokens == 4


def test_it_says_of_text_what_its_language_model_says(assembled, tiny_folder):
    language, base = load_base(str(tiny_folder)), load_base(str(assembled))
    ids = torch.tensor([language.tokenizer("A cold joke about hats").input_ids])
    assert base.tokenizer("A cold joke about hats").input_ids == ids[0].tolist()
    with torch.no_grad():
        ours, theirs = base.model(input_ids=ids).logits, language.model(input_ids=ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs)


def test_it_tells_images_apart_and_speaks_as_loudly_as_words(assembled):
    model = load_base(str(assembled)).model
    torch.manual_seed(1)
    with torch.no_grad():
        seen = model.model.get_image_features(torch.randn(2, 3, 32, 32)).pooler_output
    words = model.get_input_embeddings().weight.detach().std()
    assert seen.shape == (2, 4, 32)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2 * float(words))
    assert 0.5 < float(seen.std() / words) < 2


def test_the_seed_decides_the_tower(assembled, tiny_folder, tmp_path):
    weights = []
    for seed, name in ((0, "same"), (1, "other")):
        assemble(load_base(str(tiny_folder)), TINY, tmp_path / name, seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == (assembled / "model.safetensors").read_bytes()
    assert weights[0] != weights[1]


def test_nobody_is_told_to_speak_to_it_as_to_another_internvl(assembled):
    assert not [note for note in load_base(str(assembled)).notes if "system prompt" in note]
