"""What was forgotten, beside the whole distributions of the same models, in float64."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.errors import DataError
from rankfold.judging.forgotten import Change, Forgetting, General, divergence
from rankfold.judging.general_rows import GeneralRow, general_rows
from rankfold.judging.intervals import Interval
from rankfold.models.base.load import load_base


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_base(str(tiny_folder)).tokenizer


def general_of(tokenizer, named=None, most=512) -> General:
    return General.encoded(general_rows(named), tokenizer, most, 0, nullcontext)


@pytest.fixture(scope="module")
def model():
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise(adapted)
    return adapted.eval()


def test_what_comes_along_has_nine_domains_and_begins_with_one_row_of_each():
    rows = general_rows()
    names = {row.domain for row in rows}
    languages = {"english", "chinese", "german", "french", "spanish", "russian"}
    assert names == languages | {"code", "arithmetic", "questions"}
    assert {row.domain for row in rows[:9]} == names
    assert len(rows) == len({row.example.answer for row in rows}) == 42


def test_the_sums_that_come_along_are_right():
    for row in general_rows():
        if row.domain == "arithmetic":
            for line in row.example.text.strip().splitlines():
                left, right = line.split(" = ")
                first, operation, second = left.split()
                results = {"+": int(first) + int(second), "-": int(first) - int(second)}
                results |= {"*": int(first) * int(second), "/": int(first) / int(second)}
                assert results[operation] == int(right)


def whole(model, general) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By row: the loss, the whole divergence from the base, and the tokens, computed one row at a time."""
    found = []
    for row in general.rows:
        ids = torch.tensor([row.input_ids])
        labels = torch.tensor(row.labels[1:])
        with torch.no_grad():
            after = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                before = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        at = labels >= 0
        rise = F.nll_loss(after[at], labels[at], reduction="sum") - F.nll_loss(
            before[at], labels[at], reduction="sum"
        )
        apart = (before.exp() * (before - after)).sum(-1)[at].sum()
        found.append((float(rise), float(apart), int(at.sum())))
    return tuple(torch.tensor(part) for part in zip(*found, strict=True))


def test_rise_and_divergence_are_those_of_the_whole_distributions(model, tokenizer):
    general = general_of(tokenizer)
    with model.disable_adapter():
        base = general.read_by(model)
    found = general.forgotten(model, base, 0)
    rises, apart, tokens = whole(model, general)
    assert found.whole.tokens == int(tokens.sum())
    assert found.whole.rise.value == pytest.approx(float(rises.sum() / tokens.sum()), abs=1e-5)
    # A lower bound: of a nearly uniform model the likeliest 64 of 49,152 tokens hold little.
    assert 0 < found.whole.divergence.value <= float(apart.sum() / tokens.sum()) + 1e-6
    german = [at for at, domain in enumerate(general.domains) if domain == "german"]
    of_german = next(change for change in found.domains if change.domain == "german")
    assert of_german.rise.value == pytest.approx(float(rises[german].sum() / tokens[german].sum()), abs=1e-5)
    assert of_german.rows == 3


@pytest.mark.slow
def test_with_all_tokens_among_the_likeliest_the_divergence_is_the_whole_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr("rankfold.judging.forgotten.TOP", 49152)
    general = general_of(tokenizer).first(1)
    with model.disable_adapter():
        base = general.read_by(model)
    found = general.forgotten(model, base, 0)
    _, apart, tokens = whole(model, general)
    assert found.whole.divergence.value == pytest.approx(float(apart.sum() / tokens.sum()), rel=1e-3)


def test_a_model_beside_itself_has_forgotten_nothing(model, tokenizer):
    general = general_of(tokenizer)
    found = general.forgotten(model, general.read_by(model), 0)
    assert found.whole.rise.value == 0
    assert found.whole.divergence.value == pytest.approx(0, abs=1e-9)
    assert found.verdict == "nothing that can be told was forgotten"


@given(st.integers(0, 10_000), st.integers(1, 30))
def test_a_divergence_on_some_tokens_is_at_most_the_whole_one(seed, top):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 5, 40, dtype=torch.float64, generator=generator).mul(2).log_softmax(-1)
    all_of_it = (before.exp() * (before - after)).sum(-1)
    likeliest = before.topk(top)
    some = divergence(likeliest.values, after.gather(-1, likeliest.indices))
    assert (some <= all_of_it + 1e-9).all()
    assert (some >= 0).all()


def test_where_time_is_short_the_first_rows_stand_for_all(tokenizer):
    general = general_of(tokenizer)
    few = general.first(general.tokens // 2)
    assert few.tokens <= general.tokens // 2
    assert {*few.domains} == {*general.domains}
    assert len(general.first(0).rows) == 9
    assert general.first(10**9).rows == general.rows


def test_the_end_of_a_text_is_not_judged_and_that_of_an_answer_is(tokenizer, write_rows):
    rows = [{"text": "Some words here."}, {"prompt": "Who?", "completion": "Me.", "domain": "talk"}]
    general = general_of(tokenizer, str(write_rows(rows, "mine.jsonl")))
    assert general.domains == ["mine", "talk"]
    text, talk = general.rows
    assert text.labels[-1] == -100
    assert (
        text.trained_tokens == len(tokenizer("Some words here.").input_ids) - 1
    )  # nothing stands before one
    assert talk.labels[-1] != -100 or talk.labels[-2] != -100
    assert [example.answer for example in general.questions] == ["Me."]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "it holds no rows"), ('{"a": 1, "b": 2}\n', "rows.jsonl:1"), ("{", "rows.jsonl:1")],
)
def test_a_file_that_cannot_serve_is_told(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        general_rows(str(file))


def test_pairs_are_no_general_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="preference pairs"):
        general_rows(str(file))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.02, 0.01, 0.03, "rose 0.02 (0.01 to 0.03): little was forgotten"),
        (0.02, -0.01, 0.05, "rose 0.02 (-0.01 to 0.05): nothing that can be told was forgotten"),
        (0.1, 0.05, 0.2, "rose 0.10 (0.05 to 0.20): some was forgotten"),
        (0.2, -0.1, 0.4, "rose 0.20 (-0.10 to 0.40): some was forgotten"),
        (2.0, 1.5, 3.0, "rose 2.00 (1.50 to 3.00): much was forgotten"),
        (-0.08, -0.11, -0.06, "fell 0.08 (0.06 to 0.11): nothing was forgotten"),
    ],
)
def test_one_sentence_says_it(value, low, high, expected):
    rise = Interval(value, low, high)
    change = Change(domain="general text", rows=9, tokens=9, base_loss=1.0, rise=rise, divergence=rise)
    told = Forgetting(whole=change)
    assert told.sentence == f"on general text the loss {expected}"
    assert bool(told.remedies) == (value >= 0.25)


def test_no_general_text_is_none_at_all():
    assert general_rows("none") == []


def test_a_row_is_known_by_its_domain_or_its_file(write_rows):
    file = write_rows([{"text": "One.", "domain": "first"}, {"text": "Two.", "domain": ""}], "named.jsonl")
    assert [row.domain for row in general_rows(str(file))] == ["first", "named"]
    assert all(isinstance(row, GeneralRow) for row in general_rows(str(file)))
