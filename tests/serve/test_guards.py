"""Who is kept out, and what a server bears: broken, endless, slow and many requests."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from rankfold.errors import ConfigError
from rankfold.models.answering.loop import Loop
from rankfold.serve import connections
from rankfold.serve.request import ServeRequest
from rankfold.serve.run import guards_of, listen
from serving import make_adapters, running

KEY = "a-key-of-the-office"
MOST_BYTES = 200_000
CHAT = {"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
ENDLESS = CHAT | {"max_tokens": 100_000, "logit_bias": {"5": 100}}  # token 5 ends no answer


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    found = make_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"), ("one",))
    limits = {"at_once": 2, "queue": 3, "body_mb": MOST_BYTES / 1e6, "body_s": 1, "answer_s": 20}
    with running(tiny_folder, found, **limits) as server:
        yield server


@pytest.fixture
def raw(server):
    """A connection to the server, and what it sends until it closes or says nothing for a second."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port)) as found:
        found.settimeout(5)
        yield found


@pytest.fixture
def slowly(monkeypatch):
    """A token takes a while, as of a larger model: an answer is not at its end before it is looked at."""
    turn = Loop.turn

    def late(loop):
        time.sleep(0.05)
        return turn(loop)

    monkeypatch.setattr(Loop, "turn", late)


def post(server, **options):
    return httpx.post(f"{server.url}/chat/completions", timeout=60, **options)


def test_what_others_can_reach_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("RANKFOLD_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="RANKFOLD_API_KEY"):
        guards_of(ServeRequest(host="0.0.0.0"))
    assert guards_of(ServeRequest()).key is None
    file = tmp_path / "key"
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="5 characters"):
        guards_of(ServeRequest(host="0.0.0.0", api_key_file=file))
    file.write_text(f"{KEY}\n")
    assert guards_of(ServeRequest(host="0.0.0.0", api_key_file=file)).key == KEY
    monkeypatch.setenv("RANKFOLD_API_KEY", KEY)
    assert guards_of(ServeRequest(host="0.0.0.0")).key == KEY
    with pytest.raises(ConfigError, match="nothing"):
        guards_of(ServeRequest(api_key_file=tmp_path / "nothing"))


def test_every_route_but_health_wants_the_key(tiny_folder, monkeypatch):
    monkeypatch.setenv("RANKFOLD_API_KEY", KEY)
    with running(tiny_folder, {}) as server:
        assert httpx.get(f"{server.root}/health").status_code == 200
        schema = httpx.get(f"{server.root}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        paths = {*schema["paths"], "/docs", "/openapi.json", "/nothing"} - {"/health"}
        assert len(paths) > 8
        for path in paths:
            for header in (None, "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \u00e4"):
                headers = [] if header is None else [(b"Authorization", header.encode("utf-8"))]
                found = httpx.post(server.root + path, headers=headers)
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key"), path
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        assert [model.id for model in server.client(api_key=KEY).models.list()] == [server.base_name]


def test_a_page_of_elsewhere_may_not_call_it(server):
    place = urlsplit(server.url).netloc
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Origin": "https://evil.example"},
                    {"Origin": "null"}, {"Host": "["}):  # fmt: skip
        found = httpx.get(f"{server.url}/models", headers=headers)
        assert found.status_code in (400, 403), headers
        assert "Access-Control-Allow-Origin" not in found.headers
    for headers in ({"Host": "localhost"}, {"Origin": f"http://{place}"}):
        assert httpx.get(f"{server.url}/models", headers=headers).status_code == 200


def test_a_page_that_is_named_may_call_it(tiny_folder):
    page = "https://page.example"
    with running(tiny_folder, {}, origins=[page]) as server:
        asked = {
            "Origin": page,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        found = httpx.options(f"{server.url}/chat/completions", headers=asked)
        assert found.headers["Access-Control-Allow-Origin"] == page
        assert (
            httpx.get(f"{server.url}/models", headers={"Origin": page}).headers["Access-Control-Allow-Origin"]
            == page
        )
        assert (
            httpx.get(f"{server.url}/models", headers={"Origin": "https://other.example"}).status_code == 403
        )


def test_requests_that_are_too_large_are_not_read(server):
    assert post(server, content=b"x" * (MOST_BYTES + 1)).status_code == 413

    def parts():
        for _ in range(100):
            yield b" " * 10_000

    assert post(server, content=parts()).status_code == 413  # which does not say how long it is


def test_a_request_that_does_not_come_ends(server, raw):
    raw.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    started = time.monotonic()
    assert b" 408 " in raw.recv(1000)
    assert time.monotonic() - started < 4


def test_a_connection_that_says_nothing_is_closed(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    place = urlsplit(server.url)
    for begun in (b"", b"GET /v1/models HTTP/1.1\r\nHost: local"):
        with socket.create_connection((place.hostname, place.port)) as found:
            found.settimeout(5)
            found.sendall(begun)
            assert found.recv(1000) == b""
    connection = http.client.HTTPConnection(place.hostname, place.port)
    for _ in range(3):  # while one that asks again and again stays
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        time.sleep(0.2)
    connection.close()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[" * 100_000, b'{"model":' * 20_000, b"\xff\xfe", b'{"model": "\xff"}', b"null", b"5",
        b'{"model": "one", "messages": NaN}', json.dumps(CHAT | {"temperature": float("nan")}).encode(),
        json.dumps(CHAT | {"seed": 2**64}).encode(), json.dumps(CHAT | {"n": 2.5}).encode(),
        b'{"model": "one", "model": 5, "messages": []}', json.dumps(CHAT | {"model": "\ud800"}).encode(),
        json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_broken_bodies_are_told(server, content, kind):
    found = post(server, content=content, headers={"Content-Type": kind})
    assert found.status_code in (400, 404), found.text
    assert found.json()["error"]["message"]


def test_more_than_may_wait_are_told_to_come_again_and_who_goes_makes_room(server, slowly):
    client = server.client()
    bodies = {name: value for name, value in ENDLESS.items() if name != "max_tokens"}
    held = [client.chat.completions.create(**bodies, max_tokens=100_000, stream=True) for _ in range(2)]
    held += [client.chat.completions.create(**bodies, max_tokens=100_000, stream=True, n=3)]
    for stream in held[:2]:
        next(iter(stream))
    full = post(server, json=CHAT)
    assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
    assert httpx.get(f"{server.root}/health").status_code == 200
    for stream in held:
        stream.close()
    deadline = time.monotonic() + 10
    while server.served.engine.pending and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.served.engine.pending == 0
    assert post(server, json=CHAT).status_code == 200


def test_a_client_that_goes_without_a_stream_makes_room_too(server, slowly):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/chat/completions", json=ENDLESS | {"n": 5}, timeout=0.5)
    deadline = time.monotonic() + 10
    while server.served.engine.pending and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.served.engine.pending == 0


def test_an_answer_that_takes_too_long_ends(tiny_folder, slowly):
    with running(tiny_folder, {}, answer_s=0.2) as server:
        found = post(server, json=ENDLESS | {"model": "base", "n": 8})
        assert found.status_code == 408
        assert "--answer-s" in found.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="answer-s"):
            list(server.client().chat.completions.create(**ENDLESS | {"model": "base", "n": 8}, stream=True))


def test_no_more_requests_are_open_than_may_be(tiny_folder):
    with running(tiny_folder, {}, at_once=1, queue=0, body_s=3) as server:
        place, held = urlsplit(server.url), []
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        for _ in range(65):
            held.append(socket.create_connection((place.hostname, place.port)))
            held[-1].sendall(head)
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/models").status_code == 429
        assert httpx.get(f"{server.root}/health").status_code == 200
        for each in held:
            each.close()
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/models").status_code == 200


def test_an_address_that_is_taken_is_told(server):
    with pytest.raises(ConfigError, match=r"cannot listen at 127.0.0.1 port \d+"):
        listen(ServeRequest(port=urlsplit(server.url).port))


def broken(drawn: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that somebody got wrong, or meant ill."""
    whole = json.dumps(CHAT | {"stream": drawn.random() < 0.3, "n": drawn.choice([1, 0, -1, "x", 10**9])})
    body = bytearray(whole.encode())
    for _ in range(drawn.randint(0, 4)):
        place = drawn.randrange(len(body))
        how = drawn.randrange(3)
        if how == 0:
            body[place] = drawn.randrange(256)
        elif how == 1:
            del body[place:]
            body += b"}"
        else:
            body[place:place] = drawn.randbytes(drawn.randint(1, 20))
    values = drawn.choice([None, True, [], {}, -1, 1e300, "x" * 3000, [None] * 50, {"a": {"b": {}}}])
    field = drawn.choice(
        [*CHAT, "stop", "tools", "response_format", "seed", "logit_bias", "top_logprobs", "user"]
    )
    content = bytes(body) if drawn.random() < 0.5 else json.dumps(CHAT | {field: values}).encode()
    path = drawn.choice(
        [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/load_lora_adapter",
            "/v1/models/%00",
            "/v1/models/../x",
            "/x%ff",
        ]
    )
    method = drawn.choice(["POST", "POST", "POST", "GET", "DELETE", "PUT", "PATCH"])
    kind = drawn.choice(["application/json", "text/plain", "multipart/form-data; boundary=x", ""])
    return method, path, content, {"Content-Type": kind} if kind else {}


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_broken_requests_break_nothing(server, count):
    process, statuses = psutil.Process(), {}
    drawn = random.Random(1)
    before = process.memory_info().rss
    with httpx.Client(base_url=server.root, timeout=60) as client:

        def send(request):
            method, path, content, headers = request
            return client.request(method, path, content=content, headers=headers).status_code

        with ThreadPoolExecutor(4) as pool:
            for status in pool.map(send, [broken(drawn) for _ in range(count)]):
                statuses[status] = statuses.get(status, 0) + 1
    assert not [status for status in statuses if status >= 500], statuses
    assert statuses[400] > count / 5
    assert server.served.engine.pending == 0
    assert post(server, json=CHAT).status_code == 200
    assert process.memory_info().rss - before < 100e6
