"""``rankfold chat`` with several adapters, on a tiny model whose adapters say different things."""

from __future__ import annotations

import io
import json

import pytest
from transformers import AutoModelForCausalLM

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.cli.chat import named_adapters
from rankfold.errors import ConfigError
from rankfold.judging.request import EvalRequest
from rankfold.judging.rows import read_data
from rankfold.models.answering.answers import replies
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.load import load_base, load_tuned

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two")):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        config = LoraConfig(r=4 + 4 * number, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        randomise(model, seed=number + 1)
        model.save_pretrained(place / name)
    return place


@pytest.fixture
def chat(command, adapters, monkeypatch):
    """Status, output and errors of a chat in which this was typed."""
    named = [word for name in ("one", "two") for word in ("--adapter", f"{name}={adapters / name}")]

    def run(typed):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return command("chat", *named, *GREEDY)

    return run


def alone(adapters, tiny_folder, name, *texts):
    """What a model with one adapter merged answers to a conversation."""
    base = load_base(str(tiny_folder)) if name == "base" else load_tuned(adapters / name)
    sampling, messages = Sampling(temperature=0, max_new_tokens=6), []
    for text in texts:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": replies(base, [messages], sampling)[0]})
    return [message["content"] for message in messages[1::2]]


def test_each_voice_answers_as_it_does_alone_and_has_a_conversation_of_its_own(chat, adapters, tiny_folder):
    typed = "Hello?\n/use two\nHello?\n/base\nHello?\n/use one\nAnd then?\n/use one two\nGo on.\n"
    status, printed, _ = chat(typed)
    assert status == 0
    one = alone(adapters, tiny_folder, "one", "Hello?", "And then?", "Go on.")
    two = alone(adapters, tiny_folder, "two", "Hello?", "Go on.")
    base = alone(adapters, tiny_folder, "base", "Hello?")
    assert len({one[0], two[0], base[0]}) == 3
    said = [one[0], "answering: two", two[0], "answering: base", base[0], "answering: one", one[1]]
    said += ["answering: one, two", f"one> {one[2]}", f"two> {two[1]}"]
    assert printed == "".join(f"{line}\n" for line in said)


def test_a_conversation_is_saved_as_rows_and_gone_on_with(chat, tmp_path):
    file = tmp_path / "said.jsonl"
    status, first, _ = chat(f'/system Be brief.\n"""\nTwo\nlines\n"""\n/save {file}\nMore.\n')
    assert status == 0
    [row] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "Two\nlines"
    _, again, _ = chat(f"/load {file}\nMore.\n")
    assert again.splitlines()[-1] == first.splitlines()[-1]
    [example] = read_data(EvalRequest.of({"data": str(file)})).examples
    assert (example.kind, example.messages[1].text) == ("chat", "Two\nlines")
    status, _, told = chat(f"Hello?\n/save {file}\n")
    assert (status, "name of a new file" in told) == (2, True)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/use tow\n", "nobody is called 'tow' (did you mean 'two'?)"),
        ("/image a.png\n", "cannot see images"),
        ("/load nowhere.jsonl\n", "no conversation that was saved"),
    ],
)
def test_what_cannot_be_done_is_told(chat, typed, told):
    status, _, errors = chat(typed)
    assert (status, told in errors) == (2, True), errors


def test_adapters_of_different_bases_and_names_that_are_taken_are_refused(command, adapters, tmp_path):
    config = json.loads((adapters / "two" / "adapter_config.json").read_text())
    (tmp_path / "other").mkdir()
    told = json.dumps(config | {"base_model_name_or_path": "elsewhere"})
    (tmp_path / "other" / "adapter_config.json").write_text(told)
    status, _, errors = command("chat", "--adapter", adapters / "one", "--adapter", tmp_path / "other")
    assert status == 2
    assert "do not name one base" in errors
    assert "other: elsewhere" in errors
    assert list(named_adapters((str(adapters / "one"), f"b={adapters / 'two'}"))) == ["one", "b"]
    for twice in (("a=x", "a=y"), ("base=x",), (str(adapters / "one"), f"one={adapters / 'two'}")):
        with pytest.raises(ConfigError, match="is taken"):
            named_adapters(twice)
