from __future__ import annotations

import copy
import dataclasses

import torch

from rankfold.models.answering.answers import answer_all, reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.messages.prompt import prompt_encoder

ASK = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_real_model_answers(real_base):
    answer = reply(real_base, ASK, Sampling(max_new_tokens=12, temperature=0))
    assert "Paris" in answer
    assert "<|" not in answer


def test_the_likeliest_answer_is_a_plain_argmax_walk(real_base):
    ids = real_base.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            following = real_base.model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    expected = real_base.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert reply(real_base, ASK, Sampling(max_new_tokens=6, temperature=0)) == expected.strip()


def test_an_answer_knows_its_tokens_and_why_it_ended(real_base):
    asked = [[{"role": "user", "content": text}] for text in ("Say only: Hi.", "Tell me a long story.")]
    short, long = answer_all(real_base, asked, Sampling(max_new_tokens=24, temperature=0.0))
    assert (long.finish_reason, len(long.tokens)) == ("length", 24)
    assert short.finish_reason == (
        "stop" if short.tokens[-1] in real_base.tokenizer.all_special_ids else "length"
    )
    for answer, messages in zip((short, long), asked, strict=True):
        assert answer.text == reply(real_base, messages, Sampling(max_new_tokens=24, temperature=0.0))
        assert answer.prompt_tokens == len(prompt_encoder(real_base.tokenizer).prompt_ids(messages))


def test_a_seed_repeats_and_another_seed_does_not(real_base):
    answers = [
        reply(real_base, ASK, Sampling(max_new_tokens=16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_asking_leaves_the_random_state_alone(real_base):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    reply(real_base, ASK, Sampling(max_new_tokens=2))
    assert torch.equal(torch.rand(1), expected)


def test_a_model_tuned_on_running_text_continues_the_text(real_base):
    plain = dataclasses.replace(real_base, prompt_style="plain")
    answer = reply(
        plain,
        [{"role": "user", "content": "The capital of France is"}],
        Sampling(max_new_tokens=3, temperature=0),
    )
    assert answer.startswith("Paris")


def test_a_user_who_spells_control_tokens_is_answered_not_obeyed(real_base):
    """The reply is a plain argmax walk from the prompt in which the spelt token is words."""
    ask = [{"role": "user", "content": "What is <|im_end|>?"}]
    ids = torch.tensor([prompt_encoder(real_base.tokenizer).prompt_ids(ask)])
    assert ids[0].tolist().count(real_base.tokenizer.eos_token_id) == 2  # of the system's and the user's turn
    with torch.no_grad():
        first = real_base.model(ids).logits[:, -1].argmax()
    expected = real_base.tokenizer.decode(first)
    assert reply(real_base, ask, Sampling(max_new_tokens=1, temperature=0)) == expected.strip()


def test_a_base_without_a_template_is_asked_in_the_plain_one(real_base):
    tokenizer = copy.deepcopy(real_base.tokenizer)
    tokenizer.chat_template = None
    bare = dataclasses.replace(real_base, tokenizer=tokenizer)
    written = "<|im_start|>### User:\nHi\n\n### Assistant:\n"
    ids = torch.tensor([tokenizer(written)["input_ids"]])
    with torch.no_grad():
        first = real_base.model(ids).logits[:, -1].argmax()
    sampling = Sampling(max_new_tokens=1, temperature=0)
    assert reply(bare, [{"role": "user", "content": "Hi"}], sampling) == tokenizer.decode(first).strip()
