"""Answers together against transformers' ``generate`` alone, token by token."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.models.answering.answerable import why_not
from rankfold.models.answering.asked import Asked, Manner
from rankfold.models.answering.loop import Loop
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from tiny_models import ARCHITECTURES, tiny

TOKENS = 8
GREEDY = Sampling(max_new_tokens=TOKENS, temperature=0)
STOPS = frozenset({2})


class Letters:
    """A tokenizer of 64 characters, as far as a loop needs one."""

    added_tokens_decoder = MappingProxyType({})

    def decode(self, ids, **_):
        return "".join(chr(48 + token) for token in ids)

    def convert_ids_to_tokens(self, token):
        return chr(48 + token)


def base_of(model: nn.Module) -> Base:
    model.generation_config.eos_token_id = None
    return Base(model, Letters(), SimpleNamespace(name="tiny"))  # type: ignore[arg-type]


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    drawn = random.Random(seed)
    lengths = [drawn.randint(1, longest) for _ in range(count)]
    return [[drawn.randint(3, 63) for _ in range(length)] for length in lengths]


def asked(rows: list[list[int]], sampling=GREEDY, names=None) -> list[tuple[int, Asked]]:
    names = names or [None] * len(rows)
    manners = [Manner(Letters(), STOPS, sampling, name) for name in names]
    return [
        (place, Asked(ids, {}, str(place), manner))
        for place, (ids, manner) in enumerate(zip(rows, manners, strict=True))
    ]


def together(base: Base, rows, at_once=7, sampling=GREEDY, cache_bytes=1e9, guesses=0):
    loop = Loop(base.model, at_once, cache_bytes, guesses)
    return [answer for _, answer in sorted(loop.run(iter(asked(rows, sampling))), key=lambda found: found[0])]


@torch.no_grad()
def alone(model: nn.Module, ids: list[int], **options) -> list[int]:
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=[*STOPS],
        pad_token_id=0,
        **options,
    )
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny(request.param)


def test_greedy_answers_are_those_of_transformers_whatever_stands_beside_them(model):
    base, rows = base_of(model), prompts(34)
    assert why_not(base, GREEDY) == ""
    expected = [alone(model, ids) for ids in rows]
    for at_once in (1, 7, 32):
        order = random.Random(at_once).sample(range(len(rows)), len(rows))
        shuffled = together(base, [rows[place] for place in order], at_once)
        assert [answer.tokens for answer in shuffled] == [expected[place] for place in order]


def test_what_prompts_begin_with_is_read_once_and_changes_nothing(model):
    begun, other = prompts(2, 30, seed=3)
    begun, other = (begun * 30)[:20], (other * 30)[:12]
    rows = [[*(begun if n % 3 else other), *ids] for n, ids in enumerate(prompts(12, 12, seed=4))]
    expected = [alone(model, ids) for ids in rows]
    assert [answer.tokens for answer in together(base_of(model), rows, 5)] == expected
    assert [answer.tokens for answer in together(base_of(model), [rows[0]] * 9, 4)] == [expected[0]] * 9
    assert [answer.tokens for answer in together(base_of(model), rows[:6], 1)] == expected[:6]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3}, {"repetition_penalty": 1.3}], ids=str)
def test_guesses_change_nothing(model, settings):
    base = base_of(model)
    rows = [ids * 3 for ids in prompts(8, 8, seed=10)]  # which says what may come next
    sampling = GREEDY.model_copy(update={"logprobs": True, **settings})
    apart = together(base, rows, 1, sampling)
    found = together(base, rows, 1, sampling, guesses=4)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in apart]
    for one, other in zip(found, apart, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_right_guesses_save_steps():
    model, passes = tiny("Llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: passes.append(args[0].shape[1]))
    long, rows = GREEDY.model_copy(update={"max_new_tokens": 40}), [ids * 3 for ids in prompts(6, 8, seed=10)]
    apart = together(base_of(model), rows, 1, long)
    without = len(passes)
    assert [a.tokens for a in together(base_of(model), rows, 1, long, guesses=4)] == [a.tokens for a in apart]
    assert len(passes) - without < 0.8 * without  # a model of random weights soon repeats itself


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_shared_beginning_passes_the_model_once(at_once):
    model, read = tiny("Llama"), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    begun = prompts(1, 30, seed=8)[0] * 30
    rows = [[*begun[:30], *ids] for ids in prompts(8, 10, seed=9)]
    answers = together(base_of(model), rows, at_once)
    steps = sum(len(answer.tokens) - 1 for answer in answers)
    apart = sum(map(len, rows)) + steps
    assert sum(read) <= apart - 7 * 30 + 8 * 10  # and some padding


def test_rows_that_do_not_fit_wait(model):
    rows = prompts(12, 20, seed=5)
    expected = [alone(model, ids) for ids in rows]
    loop = Loop(model, 6, 1e9)
    list(loop.run(iter(asked(rows[:1]))))
    little = loop.slots.column_bytes * 50
    found = together(base_of(model), rows, 6, cache_bytes=little)
    assert [answer.tokens for answer in found] == expected


def test_logprobs_are_those_of_the_models_logits(model):
    sampling = GREEDY.model_copy(update={"logprobs": True})
    rows = prompts(9, seed=6)
    for ids, answer in zip(rows, together(base_of(model), rows, 4, sampling), strict=True):
        whole = torch.tensor([ids + answer.tokens])
        with torch.no_grad():
            likely = model(whole).logits[0].log_softmax(dim=-1)
        places = range(len(ids) - 1, whole.shape[1] - 1)
        expected = [float(likely[place, whole[0, place + 1]]) for place in places]
        assert answer.logprobs == pytest.approx(expected, abs=2e-5)


def test_a_repetition_penalty_is_that_of_transformers(model):
    rows = prompts(9, seed=7)
    sampling = GREEDY.model_copy(update={"repetition_penalty": 1.7})
    expected = [alone(model, ids, repetition_penalty=1.7) for ids in rows]
    assert [answer.tokens for answer in together(base_of(model), rows, 4, sampling)] == expected
    assert expected != [alone(model, ids) for ids in rows]


def adapted(kinds: dict[str, dict]) -> nn.Module:
    model = None
    for name, options in kinds.items():
        config = LoraConfig(**({"target_modules": ["c_attn", "c_fc"], "r": 3} | options))
        if model is None:
            model = get_peft_model(tiny("GPT2"), config, name)
        else:
            model.add_adapter(name, config)
    randomise(model)
    model.eval().double()
    model.get_base_model().generation_config.eos_token_id = None
    return model


NAMES = ["__base__", "one", "two", "biases"]
KINDS = {
    "one": {},
    "two": {"r": 5, "use_dora": True},
    "biases": {"bias": "lora_only"},
}


def by_itself(model, ids, name):
    with model.disable_adapter() if name == "__base__" else nullcontext():
        if name != "__base__":
            model.set_adapter(name, inference_mode=True)
        return alone(model, ids)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_rows_of_several_adapters_are_answered_together_as_alone(at_once):
    model = adapted(KINDS)
    rows = [ids for ids in prompts(8, 12, seed=11) for _ in NAMES]  # each asked of all, one after another
    names = NAMES * 8
    expected = [by_itself(model, ids, name) for ids, name in zip(rows, names, strict=True)]
    assert len({*map(str, expected)}) > 20
    model.set_adapter("two")
    loop = Loop(model, at_once, 1e9)
    found = [
        answer.tokens for _, answer in sorted(loop.run(iter(asked(rows, GREEDY, names))), key=lambda f: f[0])
    ]
    assert found == expected
    assert {kept.adapter for kept in loop.kept.all} == {*NAMES}
    loop.company.leave()
    assert model.active_adapters == ["two"]


def test_what_one_adapter_read_is_no_other_ones():
    model = adapted({"one": {}, "two": {}})
    ids = prompts(1, 30, seed=8)[0] * 3
    loop = Loop(model, 1, 1e9)
    expected = {name: by_itself(model, ids, name) for name in ("one", "two", "__base__")}
    for name in ("one", "two", "one", "__base__"):
        [(_, answer)] = loop.run(iter(asked([ids], GREEDY, [name])))
        assert answer.tokens == expected[name]
    loop.kept.forget("one")
    assert {kept.adapter for kept in loop.kept.all} == {"two", "__base__"}


def test_each_row_is_drawn_as_it_asks():
    model = tiny("Llama")
    manners = [
        GREEDY,
        Sampling(max_new_tokens=3, temperature=1.5, seed=1),
        Sampling(max_new_tokens=9, temperature=0, repetition_penalty=1.7, logprobs=True),
        Sampling(max_new_tokens=5, temperature=0, stop="7"),
    ]
    rows = prompts(8, seed=12)
    apart = [together(base_of(model), [ids], 1, manners[n % 4])[0].tokens for n, ids in enumerate(rows)]
    mixed = [asked([ids], manners[n % 4])[0][1] for n, ids in enumerate(rows)]
    answers = dict(Loop(model, 8, 1e9).run(iter(enumerate(mixed))))
    assert [answers[n].tokens for n in range(8)] == apart
    assert [answers[n].logprobs is not None for n in range(8)] == [n % 4 == 2 for n in range(8)]


def test_an_answer_that_nobody_waits_for_gives_its_place_away():
    model, gone = tiny("Llama"), set()
    rows = prompts(5, seed=13)
    manner = Manner(Letters(), frozenset(), GREEDY.model_copy(update={"max_new_tokens": 50}))
    loop = Loop(model, 2, 1e9)
    for n, ids in enumerate(rows):
        loop.put(n, Asked(ids, {}, "", manner, gone=lambda n=n: n in gone))
    loop.turn()
    assert [row.place for row in loop.rows] == [0, 1]
    gone |= {0, 1, 3}
    ended = dict(loop.turn())
    assert {n for n, answer in ended.items() if answer.problem} == {0, 1, 3}
    assert {row.place for row in loop.rows} == {2, 4}
    left = dict(loop.run(iter(())))
    expected = [alone(model, ids) for ids in rows]
    assert all(left[n].tokens[: len(expected[n])] == expected[n] for n in (2, 4))
    assert [len(left[n].tokens) for n in (2, 4)] == [64 - len(rows[n]) for n in (2, 4)]


def test_logits_can_be_bent_and_the_likeliest_are_heard():
    model, heard = tiny("Llama"), []
    manner = Manner(Letters(), frozenset(), GREEDY.model_copy(update={"logprobs": True}))

    def only_even(logits):
        logits[1::2] = -torch.inf
        return logits

    [ids] = prompts(1, seed=14)
    question = Asked(ids, {}, "", manner, hear=heard.append, bend=only_even, likeliest=3)
    [(_, answer)] = Loop(model, 1, 1e9).run(iter([(0, question)]))
    assert all(token % 2 == 0 for token in answer.tokens)
    assert [drawn.token for drawn in heard] == answer.tokens
    with torch.no_grad():
        likely = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
    best = likely.topk(3)
    assert [token for token, _ in heard[0].likeliest] == best.indices.tolist()
    assert [value for _, value in heard[0].likeliest] == pytest.approx(best.values.tolist(), abs=2e-5)
    assert heard[0].logprob == pytest.approx(float(likely[answer.tokens[0]]), abs=2e-5)
