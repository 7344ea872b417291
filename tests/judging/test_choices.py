"""The likeliest of several answers, beside reading each of them whole."""

from __future__ import annotations

import pytest
import torch

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.shapes.example import Example, Image, Message
from rankfold.data.tokens.encode import encode
from rankfold.errors import ConfigError
from rankfold.judging.choices import _encoded, _log_likelihoods, likeliest
from rankfold.judging.losses import row_losses
from rankfold.models.base.load import load_base
from tiny_models import tiny

CHOICES = ["yes", "no", "a rather long choice of many words", "a rather long one", "a", "是的"]


def example(question: str, answer: str = "yes") -> Example:
    return Example("f:1", (Message("user", (question,)), Message("assistant", (answer,))))


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load_base(str(tiny_folder))


@pytest.mark.parametrize("at_once", [1 << 30, 400_000])
def test_likelihoods_are_those_of_reading_each_row_whole(base, monkeypatch, at_once):
    """Up to what all choices have in common, which no choice hangs on."""
    monkeypatch.setattr("rankfold.judging.choices.LOGITS_AT_ONCE", at_once)
    [rows] = _encoded(base, [example("Is it so? " * 9)], [CHOICES], 512)
    ours = _log_likelihoods(base.model, rows)
    whole = -row_losses(base.model, rows, 0)
    torch.testing.assert_close(ours - ours[0], whole - whole[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Qwen3"])
def test_other_families_memories_are_copied_too(family, base):
    """Windows of attention among them."""
    model = tiny(family)
    [rows] = _encoded(base, [example("Is it so? " * 9)], [CHOICES[:3]], 512)
    size = model.get_input_embeddings().weight.shape[0]
    for row in rows:
        row.input_ids[:] = [token % size for token in row.input_ids]
        row.labels[:] = [label if label < 0 else label % size for label in row.labels]
    ours, whole = _log_likelihoods(model, rows), -row_losses(model, rows, 0)
    torch.testing.assert_close(ours - ours[0], whole - whole[0], rtol=0, atol=1e-3)


def test_an_adapter_counts(base):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.eval()
    [rows] = _encoded(base, [example("Is it?")], [CHOICES], 512)
    ours, whole = _log_likelihoods(model, rows), -row_losses(model, rows, 0)
    torch.testing.assert_close(ours - ours[0], whole - whole[0], rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(_log_likelihoods(model, rows), ours)


def test_each_row_has_its_own_choices_and_is_told_when_it_is_done(base):
    asked = [example("One?"), example("Two?"), example("Three?")]
    choices = [["a", "b"], CHOICES, ["only this"]]
    seen = []
    found = likeliest(base, asked, choices, 512, lambda: seen.append(1))
    assert len(seen) == 3
    for one, options, chosen in zip(asked, choices, found, strict=True):
        rows = [encode(_with(one, option), base.tokenizer, "last") for option in options]
        losses = row_losses(base.model, rows, 0).tolist()
        assert chosen == options[losses.index(min(losses))]


def _with(one: Example, answer: str) -> Example:
    return Example(one.origin, (*one.messages[:-1], Message("assistant", (answer,))))


def test_what_cannot_be_chosen_among_is_told(base, tmp_path):
    with pytest.raises(ConfigError, match="too long"):
        likeliest(base, [example("x")], [["a", "word " * 600]], 512)
    seen = Example("f:1", (Message("user", ("?", Image(tmp_path / "a.png"))), Message("assistant", ("a",))))
    with pytest.raises(ConfigError, match="images"):
        likeliest(base, [seen], [["a", "b"]], 512)
