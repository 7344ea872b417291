"""A server in this process over a tiny model with two adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from openai import OpenAI
from transformers import AutoModelForCausalLM

from conftest import randomise
from rankfold import LoraConfig, get_peft_model
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.several import BASE, Voice
from rankfold.models.choices import ModelRequest
from rankfold.serve.app import Served, application
from rankfold.serve.connections import ImpatientProtocol
from rankfold.serve.request import ServeRequest
from rankfold.serve.run import guards_of, listen, served_by, served_of, url_of


def make_adapters(
    base: Path, place: Path, names: tuple[str, ...] = ("one", "two"), **options
) -> dict[str, Path]:
    usual = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for number, name in enumerate(names):
        config = LoraConfig(r=4 + 4 * number, **usual | options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        randomise(model, seed=number + 1)
        model.save_pretrained(place / name)
    return {name: place / name for name in names}


@dataclass
class Running:
    """``url`` ends in /v1."""

    url: str
    served: Served

    @property
    def base_name(self) -> str:
        return self.served.speakers.base_name

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, **options) -> OpenAI:
        return OpenAI(
            **({"base_url": self.url, "api_key": "none", "timeout": 60, "max_retries": 0} | options)
        )


@contextmanager
def running(model: Path | Base, adapters: dict[str, Path], **options) -> Iterator[Running]:
    asked = ServeRequest.of({"port": 0} | options)
    guards = guards_of(asked)
    if isinstance(model, Base):
        served = served_of({BASE: Voice(BASE, model)}, {}, Sampling.of({}), asked)
    else:
        wanted = ModelRequest.of({"model": str(model), "precision": "float32"})
        served = served_by(adapters, wanted, Sampling.of({}), asked)
    listening = listen(asked)
    config = uvicorn.Config(
        application(served, guards), http=ImpatientProtocol, ws="none", lifespan="on", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield Running(url_of(listening), served)
    finally:
        server.should_exit = True
        thread.join()
