"""The server through OpenAI's own client, beside the same answers by ``reply``."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pytest
from safetensors.torch import load_file, save_file

from chat_formats import TRL
from rankfold.errors import ConfigError
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.load import load_base, load_tuned
from rankfold.serve import answering
from serving import make_adapters, running

NAMES = ("base", "one", "two")
GREEDY = {"temperature": 0, "max_tokens": 12}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    return make_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(tiny_folder, adapters):
    root = next(iter(adapters.values())).parent
    with running(tiny_folder, adapters, at_once=5, queue=200, adapter_root=root) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def alone(tiny_folder, adapters):
    models = {"base": load_base(str(tiny_folder))} | {
        name: load_tuned(place) for name, place in adapters.items()
    }
    likeliest = Sampling(temperature=0, max_new_tokens=12)
    return lambda name, messages: reply(models[name], messages, likeliest)


def user(text):
    return [{"role": "user", "content": text}]


def test_the_base_and_its_adapters_are_listed(client, server):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {server.base_name, "one", "two"}
    assert listed["one"].parent == server.base_name
    assert client.models.retrieve(server.base_name).id == server.base_name
    with pytest.raises(openai.NotFoundError, match=r"no model is called 'on'.*one"):
        client.models.retrieve("on")


def test_many_requests_for_several_adapters_are_each_answered_as_alone(client, alone):
    asked = [(NAMES[n % 3], user(f"Question {n // 2}: how many {'a' * (n % 7)}?")) for n in range(24)]

    def ask(one):
        return client.chat.completions.create(model=one[0], messages=one[1], **GREEDY)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, asked))
    assert [answer.choices[0].message.content for answer in found] == [alone(*one) for one in asked]
    assert len({answer.choices[0].message.content for answer in found}) > 12
    assert {answer.choices[0].finish_reason for answer in found} <= {"stop", "length"}
    for answer in found:
        usage = answer.usage
        assert 1 <= usage.completion_tokens <= 12
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_brings_the_same_text_in_pieces(client, alone, name):
    messages = [{"role": "system", "content": "Be brief."}, *user("Tell me a story.")]
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    chunks = list(client.chat.completions.create(model=name, messages=messages, **GREEDY, **options))
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [alone(name, messages)] * 2
    assert set(reasons) <= {"stop", "length"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens <= 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_and_no_seed_does_not(client):
    def ask(**options):
        found = client.chat.completions.create(
            model="one", messages=user("Draw."), temperature=1.5, max_tokens=10, n=2, **options
        )
        return [choice.message.content for choice in found.choices]

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask()
    assert len(set(ask(seed=7))) == 2


def test_logprobs_are_told_with_the_likeliest_tokens_whole_and_streamed(client):
    options = {"model": "two", "messages": user("How likely?"), "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**options).choices[0]
    content = whole.logprobs.content
    for token in content:
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
    spelt = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert whole.message.content.strip("\ufffd") in spelt
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [token.bytes for token in streamed] == [token.bytes for token in content]


def test_completions_go_on_with_texts_and_tokens(client, server):
    tokenizer = server.served.speakers.base.tokenizer
    texts = ["Once upon a time", "The end"]
    found = client.completions.create(model="one", prompt=texts, n=2, echo=True, logprobs=2, **GREEDY)
    assert [choice.text.startswith(texts[n // 2]) for n, choice in enumerate(found.choices)] == [True] * 4
    assert found.choices[0].text == found.choices[1].text
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.text_offset)
    assert found.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    bare = client.completions.create(model="one", prompt=texts, n=2, **GREEDY)
    assert bare.usage == found.usage
    assert [texts[n // 2] + choice.text for n, choice in enumerate(bare.choices)] == [
        c.text for c in found.choices
    ]
    by_tokens = client.completions.create(model="one", prompt=ids, echo=True, **GREEDY)
    assert [c.text for c in by_tokens.choices] == [c.text for c in found.choices[::2]]
    streamed = client.completions.create(model="one", prompt=texts[0], echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == found.choices[0].text


def test_stops_limits_penalties_and_biases_are_kept(client, server):
    ask = lambda **options: client.chat.completions.create(  # noqa: E731
        **({"model": "one", "messages": user("Say something."), **GREEDY} | options)
    )
    plain = ask().choices[0].message.content
    middle = plain[len(plain) // 2]
    assert ask(stop=middle).choices[0].message.content == plain[: plain.index(middle)].strip()
    short = ask(max_tokens=1)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")
    word = server.served.speakers.base.tokenizer.encode("z", add_special_tokens=False)[0]
    assert ask(logit_bias={str(word): 100}, max_tokens=4).choices[0].message.content == "zzzz"
    spread = ask(logit_bias={str(word): 100}, frequency_penalty=2, presence_penalty=2, max_tokens=100)
    assert spread.choices[0].message.content.count("z") < 100


def test_an_answer_follows_a_json_schema_whatever_the_model_is(client):
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for name, temperature in (("base", 0), ("one", 1.0), ("two", 1.5)):
        found = client.chat.completions.create(
            model=name, messages=user("Who?"), response_format=shape, temperature=temperature, max_tokens=200,
            logit_bias={}, seed=3,
        ).choices[0]  # fmt: skip
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.message.content), PERSON)
    assert found.finish_reason == "stop" or len(found.message.content) > 20
    anything = client.chat.completions.create(
        model="one", messages=user("?"), response_format={"type": "json_object"}, temperature=0, max_tokens=8
    )
    assert anything.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 99}, "temperature"),
        ({"n": 10**9}, "n: "),
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"beams": 3}}, "beams"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "reads"),
        ({"messages": [{"role": "assistant", "content": "I said"}]}, "asks nothing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            "schema",
        ),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])},
            "fetches",
        ),
        ({"messages": user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])}, "fetches"),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])},
            "image",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_told_as_a_request_that_is_wrong(client, options, told):
    with pytest.raises(openai.BadRequestError, match=told) as found:
        client.chat.completions.create(**({"model": "one", "messages": user("x")} | options))
    assert found.value.body["type"] == "invalid_request_error"


def test_several_mistakes_are_told_at_once(client):
    with pytest.raises(openai.BadRequestError, match=r"temperature.*top_p"):
        client.chat.completions.create(model="one", messages=user("x"), temperature=-1, top_p=5)


def test_adapters_come_and_go_while_others_are_answered(client, server, alone):
    def post(what, **body):
        return httpx.post(f"{server.url}/{what}_lora_adapter", json=body, timeout=60)

    def ask(name, **options):
        return client.chat.completions.create(model=name, messages=asked, temperature=0, **options)

    asked, many = user("Who are you now?"), {"max_tokens": 400, "logit_bias": {"2": -100}}
    long = ask("one", stream=True, max_tokens=60)
    first = next(iter(long))
    assert post("load", lora_name="third", lora_path="two").json()["id"] == "third"
    assert ask("third", max_tokens=12).choices[0].message.content == alone("two", asked)
    whole = ask("third", **many).choices[0].message.content
    old = ask("third", stream=True, **many)
    text = next(iter(old)).choices[0].delta.content
    assert post("load", lora_name="third", lora_path="one").status_code == 200  # other weights, same name
    assert ask("third", max_tokens=12).choices[0].message.content == alone("one", asked)
    text += "".join(chunk.choices[0].delta.content or "" for chunk in old)
    assert text == whole  # which ended by the weights that it began with
    assert post("unload", lora_name="third").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        ask("third")
    assert first.id in {chunk.id for chunk in long}
    assert ask("one", max_tokens=12).choices[0].message.content == alone("one", asked)
    held = server.served.speakers.base.model.peft_config
    assert len(held) <= 3  # what was unloaded is gone, but for one that is just going


@pytest.mark.parametrize(
    "path", ["../base", "/etc", "%2e%2e", "one/../../x", "", "a" * 5000, "missing", "one\0"]
)
def test_adapters_are_loaded_from_below_the_folder_only(server, path):
    found = httpx.post(f"{server.url}/load_lora_adapter", json={"lora_name": "evil", "lora_path": path})
    assert found.status_code in (400, 404)
    assert "evil" not in server.served.speakers.by_name


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 200, "base", "\u0430 b", "a\nb"])
def test_adapters_names_are_plain_words(server, name):
    found = httpx.post(f"{server.url}/load_lora_adapter", json={"lora_name": name, "lora_path": "two"})
    assert found.status_code in (400, 409)


def test_health_and_metrics_tell_how_it_is(server, client):
    client.chat.completions.create(model="one", messages=user("x"), **GREEDY)
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}
    text = httpx.get(f"{server.root}/metrics").text
    numbers = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert numbers["rankfold_answers_total"] >= 1
    assert numbers["rankfold_written_tokens_total"] >= 1
    assert numbers["rankfold_pending"] == 0
    assert numbers["rankfold_models"] == 3


def test_calls_of_tools_are_told_as_such_whole_and_streamed(tiny_folder, tmp_path):
    """A model of random weights calls nothing by itself: it is leant to the words of a call."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text((TRL / "qwen2_5.jinja").read_text())
    tool = {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    }
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    with running(folder, {}) as server:
        client, tokenizer = server.client(), server.served.speakers.base.tokenizer
        forced = _Forced(tokenizer.encode(f"Hm. {call}", add_special_tokens=False), tokenizer.eos_token_id)
        with forced:
            options = {"model": "base", "messages": user("What time?"), "tools": [tool], "max_tokens": 60}
            choice = client.chat.completions.create(**options).choices[0]
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Hm.")
            [found] = choice.message.tool_calls
            assert (found.function.name, found.function.arguments) == ("now", "{}")
            text, calls, reasons = "", [], set()
            for chunk in client.chat.completions.create(**options, stream=True):
                delta = chunk.choices[0].delta
                text, calls = text + (delta.content or ""), calls + (delta.tool_calls or [])
                reasons.add(chunk.choices[0].finish_reason)
            assert (text.strip(), reasons) == ("Hm.", {None, "tool_calls"})
            assert [each.function.name for each in calls] == ["now"]
            plain = client.chat.completions.create(**options, tool_choice="none").choices[0]
            assert "<tool_call>" in plain.message.content
        back = [*options["messages"], choice.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": found.id, "content": "noon"}]  # fmt: skip
        assert client.chat.completions.create(**options | {"messages": back}).choices[0].finish_reason


class _Forced:
    """Lets every answer be these tokens, whatever the model says."""

    def __init__(self, ids, end):
        self.ids, self.end = ids, end

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        ids, end = [*self.ids, self.end], self.end

        def benders(speaker, asked):
            return [self]

        self.patch.setattr(answering, "benders_of", benders)
        self.said, self.wanted, self.last = 0, ids, end
        return self

    def bend(self, logits):
        wanted = self.wanted[self.said % len(self.wanted)]
        logits[:] = -1e9
        logits[wanted] = 0
        return logits

    def hear(self, drawn):
        self.said += 1

    def __exit__(self, *_):
        self.patch.undo()


def test_tools_that_a_template_has_no_place_for_are_refused(client):
    tool = {"type": "function", "function": {"name": "now"}}
    with pytest.raises(openai.BadRequestError, match="no place for calls"):
        client.chat.completions.create(model="one", messages=user("x"), tools=[tool])


def test_an_adapter_that_was_unloaded_and_one_of_other_words_leave_no_trace(client, server):
    before = client.chat.completions.create(model="base", messages=user("Same?"), **GREEDY)
    for name in ("a", "b"):
        loaded = httpx.post(
            f"{server.url}/load_lora_adapter", json={"lora_name": name, "lora_path": "two"}, timeout=60
        )
        assert loaded.status_code == 200
        assert client.models.delete(name).deleted
    after = client.chat.completions.create(model="base", messages=user("Same?"), **GREEDY)
    assert before.choices[0].message.content == after.choices[0].message.content
    assert "a" not in {model.id for model in client.models.list()}


def test_an_adapter_that_does_not_fit_changes_nothing(tiny_folder, tmp_path):
    good = make_adapters(tiny_folder, tmp_path, ("good", "bad", "torn"))
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, weights)
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    with running(tiny_folder, {}, adapter_root=tmp_path) as server:
        client = server.client()

        def ask(name):
            found = client.chat.completions.create(model=name, messages=user("Same?"), **GREEDY)
            return found.choices[0].message.content

        before = ask("base")
        for name in ("bad", "torn", "bad"):
            found = httpx.post(
                f"{server.url}/load_lora_adapter", json={"lora_name": name, "lora_path": name}, timeout=60
            )
            assert (found.status_code, found.json()["error"]["param"]) == (400, "lora_path")
            assert ask("base") == before

        def load(name):
            body = {"lora_name": name, "lora_path": "good"}
            return httpx.post(f"{server.url}/load_lora_adapter", json=body, timeout=60).status_code

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(load, ["good", "again", "third", "good"])) == [200] * 4
        expected = reply(load_tuned(good["good"]), user("Same?"), Sampling(temperature=0, max_new_tokens=12))
        assert [ask(name) for name in ("good", "again", "third")] == [expected] * 3
        assert ask("base") == before


def test_an_activated_adapter_is_refused_at_the_start_and_later(tiny_folder, tmp_path):
    folders = make_adapters(tiny_folder, tmp_path, ("plain",))
    folders |= make_adapters(tiny_folder, tmp_path, ("activated",), alora_invocation_tokens=[5, 6])
    with pytest.raises(ConfigError, match="activated"), running(tiny_folder, folders):
        pass
    with running(tiny_folder, {"plain": folders["plain"]}, adapter_root=tmp_path) as server:
        body = {"lora_name": "activated", "lora_path": "activated"}
        found = httpx.post(f"{server.url}/load_lora_adapter", json=body, timeout=60)
        assert found.status_code == 400
        assert "activated" in found.json()["error"]["message"]
        assert {model.id for model in server.client().models.list()} == {server.base_name, "plain"}
