"""Starting a server."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError
from rankfold.models.answering.answerable import why_not
from rankfold.models.answering.answers import answering, loop_for
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.several import BASE, Voice, load_several
from rankfold.models.choices import ModelRequest
from rankfold.serve.app import Served
from rankfold.serve.engine import Engine
from rankfold.serve.guards import Guarded, Guards
from rankfold.serve.keys import key_of
from rankfold.serve.request import ServeRequest
from rankfold.serve.speakers import Speakers

FINISHING_S = 30  # for answers that are written when the server is told to stop
MEGABYTE = 10**6
BESIDE = 64  # requests that may be open beside those that are answered


def guards_of(asked: ServeRequest) -> Guards:
    """What keeps others out.  Raises ConfigError."""
    hosts = {"127.0.0.1", "localhost", "::1", asked.host} if asked.is_local else None
    most_open = asked.at_once + asked.queue + BESIDE
    most_bytes = int(asked.body_mb * MEGABYTE)
    return Guards(key_of(asked), hosts, most_bytes, asked.body_s, most_open, tuple(asked.origins))


def served_by(
    adapters: Mapping[str, Path], model: ModelRequest, sampling: Sampling, asked: ServeRequest
) -> Served:
    """Load the model and its adapters.  Raises what ``load_several`` and ``served_of`` do."""
    return served_of(load_several(adapters, model), adapters, sampling, asked)


def served_of(
    voices: Mapping[str, Voice], adapters: Mapping[str, Path], sampling: Sampling, asked: ServeRequest
) -> Served:
    """What answers by ``voices``, which come from the folders ``adapters``.  Raises ConfigError for a model
    that cannot answer several at once."""
    speakers = Speakers(voices, adapters)
    base = voices[BASE].base
    problems = {name: why_not(voice.base, sampling) for name, voice in voices.items()}
    if told := [f"{name}: {problem}" for name, problem in problems.items() if problem]:
        raise ConfigError(f"cannot be served, only asked one by one (rankfold chat): {'; '.join(told)}")
    settled = sampling.settled(base.model) or sampling
    engine = Engine(
        lambda: answering(speakers.base.model),
        lambda: loop_for(speakers.base.model, asked.at_once),
        asked.at_once + asked.queue,
    )
    return Served(engine, speakers, settled, asked.answer_s, asked.adapter_root, asked.jobs)


def listen(asked: ServeRequest) -> socket.socket:
    """A socket at the address.  Raises ConfigError."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
        return socket.create_server(address, family=family)
    except OSError as error:
        told = f"cannot listen at {asked.host} port {asked.port}: {error}; see --host, --port"
        raise ConfigError(told) from error


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def run(app: Guarded, listening: socket.socket, ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM: then no request is taken any more, and answers that are written have
    FINISHING_S to end."""
    import uvicorn

    from rankfold.serve.connections import ImpatientProtocol

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=FINISHING_S,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn stops at one, and raises it again at the end
        signal.signal(number, lambda *_: sys.exit(0))
    Server(config).run(sockets=[listening])
