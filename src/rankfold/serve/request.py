"""``ServeRequest``: what is served, where, and what it may cost."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rankfold.settings import CheckedSettings

EngineName = Literal["own", "vllm", "lmdeploy", "llama.cpp"]
OF_ALL = {"host", "port", "api_key_file", "at_once", "engine", "engine_python"}  # what all engines are told


class ServeRequest(CheckedSettings):
    """Build it with ``ServeRequest.of``."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen at")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at, 0 for any that is free")
    api_key_file: Path | None = Field(
        None, description="file whose first line is the key that clients must send [RANKFOLD_API_KEY]"
    )
    adapter_root: Path | None = Field(
        None, description="folder below which clients may load adapters while it runs [they may not]"
    )
    jobs: Path | None = Field(
        None, description="folder for uploaded files and fine-tuning jobs, made if missing [no jobs]"
    )
    at_once: int = Field(16, ge=1, le=1024, description="answers that are written at a time")
    queue: int = Field(64, ge=0, le=100_000, description="answers that may wait; more are told 429")
    answer_s: float = Field(600, gt=0, allow_inf_nan=False, description="seconds that an answer may take")
    body_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="seconds that a request may take to come"
    )
    body_mb: float = Field(32, gt=0, allow_inf_nan=False, description="largest request, in megabytes")
    origins: list[str] = Field(
        [], description="web pages' origins that may call it from a browser; may be given several times"
    )
    engine: EngineName = Field("own", description="who answers: own, vllm, lmdeploy or llama.cpp")
    engine_python: Path | None = Field(
        None, description="the Python interpreter of the environment that has the engine [this one]"
    )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @model_validator(mode="after")
    def _is_for_its_engine(self) -> ServeRequest:
        own = sorted(self.model_fields_set - OF_ALL) if self.engine != "own" else []
        if own:
            raise ValueError(f"{', '.join(own)}: for rankfold's own server; leave that or engine out")
        return self
