from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from rankfold import load_base
from rankfold.errors import ConfigError
from rankfold.models.answering.answers import replies, reply
from rankfold.models.answering.sampling import Sampling, own_settings, told_of_own_settings
from rankfold.models.messages.prompt import prompt_encoder

ASK = [{"role": "user", "content": "Name a colour."}]
OWN = {
    **{"repetition_penalty": 1.9, "num_beams": 3, "do_sample": True, "temperature": 0.3, "top_k": 2},
    **{"eos_token_id": [2, 99], "no_repeat_ngram_size": 2, "max_length": 20},
}


@pytest.fixture
def opinionated(tiny_folder, tmp_path):
    """A base whose own settings would change every answer."""
    folder = tmp_path / "opinionated"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(OWN))
    return load_base(str(folder))


def walk(base, steps: int) -> str:
    """The likeliest token, again and again."""
    ids = torch.tensor([prompt_encoder(base.tokenizer).prompt_ids(ASK)])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, base.model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return base.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_greedy_is_greedy_whatever_the_base_says_of_itself(opinionated):
    sampling = Sampling(max_new_tokens=12, temperature=0)
    assert reply(opinionated, ASK, sampling) == walk(opinionated, 12)
    assert replies(opinionated, [ASK, ASK], sampling) == [walk(opinionated, 12)] * 2
    assert opinionated.model.generation_config.num_beams == 3  # and the base keeps what it says


def test_a_drawn_answer_is_the_one_of_a_base_without_settings(opinionated, tiny_folder):
    sampling = Sampling(max_new_tokens=12, temperature=1.3)
    assert reply(opinionated, ASK, sampling) == reply(load_base(str(tiny_folder)), ASK, sampling)


def test_the_bases_own_settings_take_part_when_asked_for(opinionated):
    asked = Sampling(max_new_tokens=12, generation_config=True)
    options = asked.options(opinionated.model)
    assert options == {
        **{"repetition_penalty": 1.9, "num_beams": 3, "do_sample": True, "temperature": 0.3, "top_k": 2},
        **{"no_repeat_ngram_size": 2, "max_new_tokens": 12},
    }
    inputs = torch.tensor([prompt_encoder(opinionated.tokenizer).prompt_ids(ASK)])
    torch.manual_seed(0)
    wanted = opinionated.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, max_length=None, pad_token_id=2
    )
    text = opinionated.tokenizer.decode(wanted[0, inputs.shape[1] :], skip_special_tokens=True).strip()
    assert reply(opinionated, ASK, asked) == text


def test_what_is_given_wins_over_the_bases_own(opinionated):
    options = Sampling(generation_config=True, temperature=0, repetition_penalty=1.1).options(
        opinionated.model
    )
    assert (options["do_sample"], options["repetition_penalty"], options["num_beams"]) == (False, 1.1, 3)


def test_what_takes_part_is_told(opinionated, tiny_folder):
    assert told_of_own_settings(load_base(str(tiny_folder)).model, Sampling()) == []
    [told] = told_of_own_settings(opinionated.model, Sampling())
    assert told.startswith(
        "the base's own settings are not used (do_sample True, no_repeat_ngram_size 2, num_beams 3"
    )
    [told] = told_of_own_settings(opinionated.model, Sampling(generation_config=True))
    assert told.startswith("the base's own settings take part: do_sample True")
    assert "eos_token_id" not in own_settings(opinionated.model)


def test_beams_are_shown_whole_at_the_end(opinionated):
    shown: list[str] = []
    answer = reply(opinionated, ASK, Sampling(max_new_tokens=5, generation_config=True), shown.append)
    assert shown == [answer]


def test_the_new_settings_change_what_is_drawn(real_base):
    one = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
    greedy = reply(real_base, ASK, Sampling(max_new_tokens=8, temperature=0))
    for only in ({"top_k": 1}, {"min_p": 1.0}):
        assert reply(real_base, ASK, one.model_copy(update=only)) == greedy
    assert reply(real_base, ASK, one) != greedy
    repeated = Sampling(max_new_tokens=24, temperature=0)
    assert reply(real_base, ASK, repeated.model_copy(update={"repetition_penalty": 1.8})) != reply(
        real_base, ASK, repeated
    )


@pytest.mark.parametrize(
    "wrong", [{"min_p": 2}, {"top_k": -1}, {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}]
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling.of(wrong)


def test_a_base_without_an_end_of_text_is_asked_all_the_same(real_base):
    import copy

    tokenizer = copy.deepcopy(real_base.tokenizer)
    tokenizer.eos_token = None
    bare = dataclasses.replace(real_base, tokenizer=tokenizer)
    assert reply(bare, ASK, Sampling(max_new_tokens=4, temperature=0))
