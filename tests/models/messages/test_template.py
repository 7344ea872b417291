from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rankfold.errors import DataError, ModelError
from rankfold.models.messages import template as module
from rankfold.models.messages.plain_template import PLAIN_NAME
from rankfold.models.messages.template import Conversation, Rendering, render_all, template_of

CHAT = [
    {"role": "user", "content": "Hi é中 <b>"},
    {"role": "assistant", "content": " Yo "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
TRL = os.path.join(os.path.dirname(trl.__file__), "chat_templates")


class Named:
    """As much of a tokenizer as rendering needs."""

    def __init__(self, chat_template) -> None:
        self.chat_template = chat_template
        self.special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}
        self.name_or_path = "acme/model"


def render(template, messages=CHAT, for_reply=False, tools=()) -> str:
    [found] = render_all(Named(template), [Conversation(messages, [(len(messages), for_reply)], tools)])
    if isinstance(found, DataError):
        raise found
    return found[0].text


@pytest.mark.parametrize("name", sorted(name for name in os.listdir(TRL) if name.endswith(".jinja")))
def test_a_template_renders_as_in_transformers(real_base, name):
    with open(os.path.join(TRL, name), encoding="utf-8") as file:
        template = file.read()
    if "strftime_now" in template:
        template = "{% set strftime_now = fixed %}" + template.replace("strftime_now(", "('26 Jul 2024' or ")
    renders = [(count, for_reply) for count in (1, 2, 3, 4) for for_reply in (True, False)]
    tokenizer = real_base.tokenizer
    named = Named(template)
    named.special_tokens_map = tokenizer.special_tokens_map
    [found] = render_all(named, [Conversation(CHAT, renders)])
    if isinstance(found, DataError):  # one for pictures, whose messages are lists of parts
        assert "'str object' has no attribute" in str(found)
        return
    for (count, for_reply), rendering in zip(renders, found, strict=True):
        assert rendering.text == tokenizer.apply_chat_template(
            CHAT[:count], chat_template=template, tokenize=False, add_generation_prompt=for_reply
        )


def test_marks_say_where_the_last_reply_stands():
    template = (
        "{% for m in messages %}{{ m.role }}:"
        "{% generation %}{{ m.content }}.{% endgeneration %}\n{% endfor %}"
    )
    [[one, two]] = render_all(Named(template), [Conversation(CHAT, [(1, False), (4, False)])])
    assert one.text[slice(*one.marked)] == "Hi é中 <b>."
    assert two.text[slice(*two.marked)] == "See you."
    [[plain]] = render_all(Named("{{ messages[0].role }}"), [Conversation(CHAT, [(1, False)])])
    assert plain == Rendering("user", None)


def test_the_clock_of_templates_stands_still():
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "26 Jul 2024 00:00"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set n = namespace(__class__=1) %}", "a namespace cannot hold '__class__'"),
        ("{{ range(10**9) | list | length }}", "Range too big"),
        ("{{ 'a' * 10**9 }}", "more than 512 MB of memory"),
        (
            "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaa' }}{% endfor %}",
            "more than 1,000,000 characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without an end"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "conversation: roles must alternate"),
    ],
)
def test_a_hostile_or_broken_template_is_refused_and_the_worker_lives(template, reason):
    render("x")
    worker = module._WORKER.process
    with pytest.raises(DataError, match=f"(?s)the chat template of acme/model refuses .*{reason}"):
        render(template)
    assert render("x") == "x"
    assert module._WORKER.process is worker


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(3000) %}{% for b in range(3000) %}{% for c in range(3000) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{{ (10 ** (10 ** 8)) % 7 }}",  # one call into C, which no Python handler could interrupt
    ],
)
def test_a_template_that_runs_on_is_killed_by_name_and_the_next_one_works(template, monkeypatch):
    monkeypatch.setattr(module, "RENDER_SECONDS", 0.2)
    module._WORKER.close()
    with pytest.raises(
        ModelError, match=r"the chat template of acme/model was stopped: .* longer than 0.2 s"
    ):
        render(template)
    assert render("x") == "x"
    module._WORKER.close()


def test_a_worker_that_was_killed_is_started_again():
    render("x")
    module._WORKER.process.send_signal(signal.SIGKILL)
    module._WORKER.process.wait()
    assert render("y") == "y"


def test_many_conversations_keep_their_order_and_a_bad_one_spoils_no_other():
    chats = [[{"role": "user", "content": str(number)}] for number in range(1000)]
    template = "{{ raise_exception('no') if messages[0].content == '500' else messages[0].content }}"
    found = list(render_all(Named(template), (Conversation(chat, [(1, False)]) for chat in chats)))
    assert isinstance(found.pop(500), DataError)
    assert [one[0].text for one in found] == [str(number) for number in range(1000) if number != 500]


def test_a_conversation_that_is_too_long_to_render_is_refused_alone():
    long = Conversation([{"role": "user", "content": "a" * 9_000_000}], [(1, False)])
    short = Conversation(CHAT, [(1, False)])
    refused, found = render_all(Named("x"), [long, short])
    assert "too long to render" in str(refused)
    assert found == [Rendering("x")]


def test_threads_share_the_worker_without_mixing_answers():
    wrong = []

    def ask(number: int) -> None:
        for _ in range(50):
            if render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}]) != str(number):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKING = """
import os, sys
sys.path.insert(0, "tests/models")
from rankfold.models.messages import template
from rankfold.models.messages.template import Conversation, render_all

class Named:
    chat_template, special_tokens_map, name_or_path = "{{ messages[0].content }}", {}, "m"

def ask(text):
    [[found]] = render_all(Named, [Conversation([{"role": "user", "content": text}], [(1, False)])])
    return found.text

assert ask("a") == "a"
mine = template._WORKER.process.pid
child = os.fork()
if child == 0:
    good = ask("b") == "b" and template._WORKER.process.pid != mine
    template._WORKER.close()
    os._exit(0 if good else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ask("c") == "c" and template._WORKER.process.pid == mine
print(mine)
"""


def test_a_fork_gets_a_worker_of_its_own_and_none_outlives_the_program():
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", FORKING],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    for _ in range(50):
        if not os.path.exists(f"/proc/{run.stdout.strip()}"):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_of_several_templates_the_one_for_tools_is_used_with_tools():
    several = {"default": "plain", "tool_use": "tools: {{ tools[0].name }}"}
    assert render(several) == "plain"
    assert render(several, tools=[{"name": "saw"}]) == "tools: saw"
    with pytest.raises(ModelError, match=r"none of the chat templates \['a', 'b'\] is the default"):
        template_of(Named({"a": "", "b": ""}))


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    assert template_of(Named(None))[0] == PLAIN_NAME
    assert template_of(Named("x")) == ("", "x")


def test_the_sandbox_is_the_one_of_transformers():
    from rankfold.models.messages import template_worker

    assert isinstance(template_worker.compiled("x").environment, ImmutableSandboxedEnvironment)
