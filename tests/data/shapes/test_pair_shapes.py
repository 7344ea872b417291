from __future__ import annotations

import pytest

from rankfold.data.reading.row import Row
from rankfold.data.shapes.example import Example, Message
from rankfold.data.shapes.formats import detect_shape, named_shape, to_example

USER, GOOD, BAD = Message("user", ("q",)), Message("assistant", ("good",)), Message("assistant", ("bad",))
SYSTEM = Message("system", ("s",))
PAIR = Example("f:1", (USER, GOOD), rejected=(BAD,))


def example_of(values: dict) -> Example:
    return to_example(Row(values, "f:1"), detect_shape(values))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, BEST, WORST = said("user", "q"), said("assistant", "good"), said("assistant", "bad")
HUMAN = "\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad", "system": ""},
        {"prompt": [ASKED], "chosen": [BEST], "rejected": [WORST]},
        {"prompt": "q", "chosen": [ASKED, BEST], "rejected": [ASKED, WORST], "score_chosen": 9},
        {"chosen": [ASKED, BEST], "rejected": [ASKED, WORST]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": BEST, "rejected": WORST},
        {"chosen": HUMAN + "good", "rejected": HUMAN + "bad"},
    ],
)
def test_every_spelling_of_a_pair_becomes_the_same(values):
    assert detect_shape(values).name == "preference"
    assert example_of(values) == PAIR


def test_a_system_prompt_and_an_input_are_part_of_what_is_asked():
    values = {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4", "system": "s"}
    assert example_of(values).messages[:2] == (SYSTEM, Message("user", ("Add.\n1, 2",)))


def test_what_both_share_may_be_several_turns():
    before = [ASKED, BEST, said("user", "r")]
    example = example_of({"chosen": [*before, BEST], "rejected": [*before, WORST]})
    assert example.messages == (USER, GOOD, Message("user", ("r",)), GOOD)
    assert example.rejected == (BAD,)


def test_equal_answers_stay_two_for_the_rules_to_tell():
    example = example_of({"chosen": [ASKED, BEST], "rejected": [ASKED, BEST]})
    assert (example.messages[1:], example.rejected) == ((GOOD,), (GOOD,))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"chosen": "good", "rejected": "bad"}, "no prompt: neither a column of its own"),
        ({"chosen": [BEST], "rejected": [WORST]}, "no prompt"),
        (
            {"prompt": "other", "chosen": [ASKED, BEST], "rejected": [ASKED, WORST]},
            "the prompt is not what chosen and rejected begin with",
        ),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "'chosen' must be text or messages, got int"),
        ({"prompt": "q", "chosen": ["good"], "rejected": "bad"}, "'chosen' must be a list of objects"),
        ({"prompt": "q", "completion": "a", "desirable": "yes"}, "must be true or false|is missing"),
    ],
)
def test_a_pair_that_cannot_be_understood_is_told(values, problem):
    with pytest.raises(ValueError, match=problem):
        to_example(Row(values, "f:1"), named_shape("kto") if "desirable" in values else detect_shape(values))


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prompt": "q", "completion": "good"}, "kto"),
        ({"prompt": [ASKED], "completion": [BEST]}, "kto"),
        ({"messages": [ASKED, BEST]}, "kto-messages"),
    ],
)
def test_a_judged_answer_keeps_its_judgement(values, name, label):
    values = {**values, "label": label}
    assert detect_shape(values).name == name
    assert example_of(values) == Example("f:1", (USER, GOOD), desirable=label)


def test_a_table_spells_judgements_as_words():
    assert example_of({"prompt": "q", "completion": "good", "label": "False"}).desirable is False


def test_the_chosen_answers_alone_are_chats():
    row = Row({"prompt": "q", "chosen": "good", "rejected": "bad"}, "f:1")
    assert to_example(row, named_shape("chosen")) == Example("f:1", (USER, GOOD))
