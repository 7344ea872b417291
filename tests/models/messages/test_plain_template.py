from __future__ import annotations

import copy

import pytest

from rankfold.errors import DataError, ModelError
from rankfold.models.messages.plain_template import PLAIN_NAME, PLAIN_TEMPLATES, plain_template
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def bare(real_base):
    """SmolLM2's tokenizer as a base model has it: without a template."""
    tokenizer = copy.deepcopy(real_base.tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def test_the_plain_template_writes_headings_and_ends_answers_with_the_models_own_token(bare):
    [[found]] = render_all(bare, [Conversation(MESSAGES, [(4, True)])])
    assert found.text == (
        "<|im_start|>### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nYo<|im_end|>\n\n"
        "### User:\nBye\n\n### Assistant:\n"
    )


def test_a_tokenizer_without_a_begin_token_gets_none(bare):
    bare.bos_token = None
    assert prompt_encoder(bare).prompt_ids(MESSAGES)[0] == bare("### System:\n")["input_ids"][0]


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (MESSAGES, [{"name": "saw"}], "no place for tools"),
        ([{"role": "tool", "content": "x"}], [], "no place for the role tool"),
    ],
)
def test_what_it_has_no_place_for_is_refused(bare, messages, tools, message):
    [found] = render_all(bare, [Conversation(messages, [(len(messages), True)], tools)])
    assert isinstance(found, DataError)
    assert message in str(found)


def test_a_template_of_a_newer_rankfold_is_refused_by_name():
    assert plain_template(PLAIN_NAME) == PLAIN_TEMPLATES[PLAIN_NAME]
    with pytest.raises(ModelError, match=r"'rankfold-plain-99', which this rankfold does not have"):
        plain_template("rankfold-plain-99")
