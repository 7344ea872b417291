from __future__ import annotations

import copy
import dataclasses
from itertools import islice

import pytest
import torch

from conftest import randomise
from image_bases import noise
from image_models import FAMILIES, tiny_image_model
from rankfold import LoraConfig, answers, dequantise, get_peft_model, load_base
from rankfold.errors import DataError
from rankfold.models.answering.answerable import why_not
from rankfold.models.answering.answers import answer_all, replies, reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.find import BaseSource
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


GREEDY = Sampling(max_new_tokens=8, temperature=0)
TEXTS = [f"Question {n}{' and more' * (n % 3)}?" for n in range(10)]
ASKED = [[{"role": "user", "content": text}] for text in TEXTS]


def generated(base: Base, asked, tokens: int = 8) -> list[list[int]]:
    """By transformers' ``generate``, one by one."""
    found = []
    for messages in asked:
        ids = torch.tensor([prompt_encoder(base.tokenizer).prompt_ids(messages)])
        with torch.no_grad():
            output = base.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=2,
            )
        found.append(output[0, ids.shape[1] :].tolist())
    return found


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 1093]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_answers_the_same_beside_the_weights_and_merged(tiny_folder, kind):
    base = load_base(str(tiny_folder))
    options = {"target_modules": "all-linear", **ADAPTERS[kind]}
    model = get_peft_model(base.model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    tuned = dataclasses.replace(base, model=model.eval())
    expected = generated(tuned, ASKED)
    assert [answer.tokens for answer in answer_all(tuned, ASKED, GREEDY)] == expected
    with model.disable_adapter():
        untuned = [answer.tokens for answer in answer_all(tuned, ASKED, GREEDY)]
    assert untuned != expected
    merged = dataclasses.replace(base, model=model.merge_and_unload())
    assert [answer.tokens for answer in answer_all(merged, ASKED, GREEDY)] == expected


def test_one_of_several_adapters_answers(tiny_folder):
    base = load_base(str(tiny_folder))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config, "one")
    model.add_adapter("two", config)
    randomise(model)
    tuned = dataclasses.replace(base, model=model.eval())
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = [answer.tokens for answer in answer_all(tuned, ASKED, GREEDY)]
        assert found[name] == generated(tuned, ASKED)
    assert found["one"] != found["two"]


@pytest.mark.parametrize("stored", ["int8", "bfloat16", "nf4"])
@pytest.mark.parametrize("memory", ["plenty", "little"])
def test_a_base_held_in_few_bytes_answers_as_its_numbers_do(tiny_folder, stored, memory, monkeypatch):
    if stored == "nf4":
        pytest.importorskip("bitsandbytes")
    if memory == "little":
        monkeypatch.setattr("rankfold.models.answering.fast_products.EXPANDED_SHARE", 0.0)
    base = load_base(str(tiny_folder), stored=stored)
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    tuned = dataclasses.replace(base, model=model.eval())
    found = [answer.tokens for answer in answer_all(tuned, ASKED, GREEDY)]
    assert found == generated(tuned, ASKED)
    assert not any("wide" in vars(module) for module in model.modules())
    dequantise(model)
    assert found == generated(tuned, ASKED)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "smolvlm"])
def test_questions_about_images_are_answered_beside_others(family, tmp_path):
    model, processor = tiny_image_model(family)
    base = Base(model, processor.tokenizer, BaseSource(family, tmp_path, family), processor=processor)
    paths = [str(noise(tmp_path / f"{n}.png", 40 + 30 * n, 60, seed=n)) for n in range(3)]
    asked = [
        [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": text}]}]
        for path in paths
        for text in ("What?", "Who is that?", "What?")
    ]
    asked += ASKED[:4]
    one_by_one = [reply(base, each, GREEDY) for each in asked]
    assert replies(base, asked, GREEDY) == one_by_one
    assert replies(base, asked[::-1], GREEDY) == one_by_one[::-1]
    assert (why_not(base, GREEDY) == "") == (family != "qwen2_5_vl")
    with_images = [n for n, each in enumerate(asked) if n < 9]
    for n in with_images[:3]:  # by the processor's and the model's own hand
        text = processor.tokenizer.apply_chat_template(asked[n], tokenize=False, add_generation_prompt=True)
        from PIL import Image

        with Image.open(paths[n // 3]) as picture:
            inputs = processor(text=[text], images=[picture.convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        whole = processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert one_by_one[n] == whole.rstrip("\ufffd").strip()


def test_a_model_with_a_memory_of_its_own_is_answered_by_transformers(tiny_folder):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=49152,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=2,
    )
    base = dataclasses.replace(load_base(str(tiny_folder)), model=Mamba2ForCausalLM(config).eval())
    base.model.generation_config.eos_token_id = None
    assert why_not(base, GREEDY)
    found = answer_all(base, ASKED[:3], GREEDY.model_copy(update={"logprobs": True}))
    assert [answer.tokens for answer in found] == generated(base, ASKED[:3])
    assert [len(answer.logprobs) for answer in found] == [len(answer.tokens) for answer in found]
    cut = answer_all(base, ASKED[:1], GREEDY.model_copy(update={"stop": (found[0].text[3:6],)}))
    assert cut[0].text == found[0].text[:3].strip()


def test_prompts_are_taken_as_they_are_needed(tiny_folder):
    taken = []

    def endless():
        n = 0
        while True:
            taken.append(n)
            yield f"Question {n}?"
            n += 1

    base = load_base(str(tiny_folder))
    first = list(islice(answers(base, endless(), GREEDY, at_once=4), 6))
    assert [answer.text for answer in first] == [
        reply(base, [{"role": "user", "content": f"Question {n}?"}], GREEDY) for n in range(6)
    ]
    assert len(taken) < 30


def test_answers_are_given_by_the_name_of_a_folder(tiny_folder, tmp_path):
    base = load_base(str(tiny_folder))
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = [answer.tokens for answer in answers(dataclasses.replace(base, model=model), TEXTS, GREEDY)]
    assert [answer.tokens for answer in answers(tmp_path / "adapter", TEXTS, GREEDY)] == expected
    untuned = [answer.tokens for answer in answers(str(tiny_folder), TEXTS, GREEDY)]
    assert untuned != expected


def test_equal_prompts_are_drawn_apart_and_in_any_order(tiny_folder):
    base = load_base(str(tiny_folder))
    drawn = Sampling(max_new_tokens=8, temperature=1.5, seed=4)
    found = [answer.text for answer in answers(base, ["Same?"] * 4 + ["Other?"], drawn)]
    assert len(set(found)) == 5
    again = [answer.text for answer in answers(base, ["Same?", "Other?", *["Same?"] * 3], drawn, at_once=2)]
    assert again == [found[0], found[4], *found[1:4]]


def test_logits_that_are_no_numbers_are_told(tiny_folder):
    base = load_base(str(tiny_folder))
    with torch.no_grad():
        base.model.lm_head.weight[7] = float("nan")
    with pytest.raises(DataError, match="not all finite numbers"):
        reply(base, ASKED[0], GREEDY)
    assert [answer.finish_reason for answer in answers(base, TEXTS[:3], GREEDY)] == ["error"] * 3


def test_an_empty_text_to_go_on_with_is_told_where_no_token_begins_one(tiny_folder):
    base = dataclasses.replace(load_base(str(tiny_folder)), prompt_style="plain")
    opening = prompt_encoder(base.tokenizer).opening
    [empty, full] = answers(base, ["", "The"], GREEDY)
    assert (empty.finish_reason == "error") == (opening == [])
    assert full.finish_reason != "error"


def test_answering_leaves_the_model_as_it_was(tiny_folder):
    base = load_base(str(tiny_folder))
    base.model.train()
    before = {name: dict(vars(module)) for name, module in base.model.named_modules()}
    answer_all(base, ASKED, GREEDY)
    assert base.model.training
    assert {name: dict(vars(module)) for name, module in base.model.named_modules()} == before


def test_an_activated_adapter_counts_in_answers_too(real_base):
    base = dataclasses.replace(real_base, model=copy.deepcopy(real_base.model))
    called = base.tokenizer.encode(" capital", add_special_tokens=False)
    config = LoraConfig(
        target_modules="all-linear",
        r=64,
        lora_alpha=640,
        alora_invocation_tokens=called,
        task_type="CAUSAL_LM",
    )
    base = dataclasses.replace(base, model=get_peft_model(base.model, config))
    randomise(base.model)
    sampling = Sampling(max_new_tokens=8, temperature=0)
    assert "activated" in why_not(base, sampling)
    assert reply(base, ASK, sampling) != reply(real_base, ASK, sampling)
