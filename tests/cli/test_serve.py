"""``rankfold serve`` as a process, and ``rankfold chat`` that talks to it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import openai
import pytest

from serving import make_adapters

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@contextmanager
def started(*arguments, **environment):
    command = [sys.executable, "-m", "rankfold", "serve", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    return make_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(tiny_folder, adapters):
    named = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    with started(tiny_folder, *named, "--port", 0) as (process, line):
        yield process, line


def test_it_says_what_it_serves_and_where(server, tiny_folder):
    _, line = server
    assert line.startswith(f"serving {tiny_folder}, one, two at http://127.0.0.1:")
    assert line.endswith("/v1\n")


def test_a_chat_with_a_server_is_the_chat_with_its_models(
    server, tiny_folder, adapters, command, monkeypatch
):
    typed = "Hello?\n/use two\nHello?\n/use one two\nAnd then?\n/base\nHm.\n/use nobody\n"
    named = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    url = server[1].split()[-1]
    said = []
    for words in (["--server", url], named):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        said.append(command("chat", *words, *GREEDY))
    (status, printed, problem), (_, here, _) = said
    assert printed.replace(str(tiny_folder), "base") == here
    assert len({*printed.splitlines()}) > 5
    assert status == 2
    assert "nobody is called 'nobody'" in problem


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--server", "http://127.0.0.1:9/v1"], "no server at http://127.0.0.1:9/v1"),
        (["--server", "localhost"], "http://HOST:PORT/v1"),
        (["--server", "http://127.0.0.1:9/v1", "--model", "x"], "leave --adapter"),
    ],
)
def test_a_chat_without_its_server_is_told(command, words, told):
    status, _, problem = command("chat", *words)
    assert status == 2
    assert told in problem


def test_it_ends_cleanly_when_it_is_told_to_and_answers_first(tiny_folder):
    with started(tiny_folder, "--port", 0, RANKFOLD_API_KEY="the key of a test") as (process, line):
        url = line.split()[-1]
        client = openai.OpenAI(base_url=url, api_key="the key of a test", max_retries=0)
        asked = {"model": "base", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 100}}
        stream = client.chat.completions.create(**asked, max_tokens=60, stream=True, temperature=0)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        assert "the key of a test" not in line + process.stdout.read() + process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--port", "99999", "--at-once", "0"], "port"),
        (["--adapter-root", "x", "--engine", "vllm", "--jobs", "y"], "jobs"),
        (["--engine", "fast"], "engine"),
        (["--model", "other"], "named twice"),
        (["--adapter", "one=/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    command, words, told, tiny_folder, monkeypatch
):
    monkeypatch.delenv("RANKFOLD_API_KEY", raising=False)
    status, printed, problem = command("serve", tiny_folder, *words)
    assert (status, printed) == (2, "")
    assert told in problem
