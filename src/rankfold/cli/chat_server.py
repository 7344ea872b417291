"""A running server that answers in a chat, rankfold's or another that speaks OpenAI's words."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rankfold.errors import ConfigError, DataError
from rankfold.models.answering.sampling import Sampling

KEY_VARIABLE = "RANKFOLD_API_KEY"
ANSWER_S = 600
TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}


class ServedModel:
    """The model ``name`` of the server at ``url``, which ends in /v1."""

    sees = True  # the server says if it does not

    def __init__(self, url: str, name: str, sampling: Sampling) -> None:
        self.url, self.name, self.sampling = url, name, sampling

    def reply(self, messages: Sequence[Mapping[str, Any]], seed: int, write: Callable[[str], object]) -> str:
        """The answer, of which ``write`` gets the pieces.  Raises DataError for one that is refused."""
        asked = {
            "model": self.name,
            "messages": [_sent(message) for message in messages],
            "stream": True,
            "seed": seed,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            **({"stop": list(self.sampling.stop)} if self.sampling.stop else {}),
        }
        text = ""
        with _opened(f"{self.url}/chat/completions", asked) as response:
            for event in _events(response):
                if "error" in event:
                    raise DataError(event["error"]["message"])
                for choice in event.get("choices", []):
                    piece = choice["delta"].get("content") or ""
                    text += piece
                    write(piece)
        return text


def served_models(url: str, sampling: Sampling) -> dict[str, ServedModel]:
    """What the server at ``url`` answers by, by its names, the base first.  Raises ConfigError if there is no
    such server."""
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--server wants http://HOST:PORT/v1, and got {url}")
    try:
        with _opened(f"{url}/models") as response:
            listed = json.load(response)["data"]
            names = [each["id"] for each in sorted(listed, key=lambda each: each.get("parent") is not None)]
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"no server at {url}: {error}") from error
    return {name: ServedModel(url, name, sampling) for name in names}


@contextmanager
def _opened(url: str, asked: Any = None) -> Iterator[HTTPResponse]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    content = None if asked is None else json.dumps(asked).encode()
    try:
        with urlopen(Request(url, content, headers), timeout=ANSWER_S) as response:
            yield response
    except HTTPError as error:
        raise DataError(f"{_problem(error)} (status {error.code})") from error
    except (URLError, OSError, HTTPException) as error:
        raise DataError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error


def _problem(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        content = line.decode("utf-8").strip().removeprefix("data:").strip()
        if content.startswith("{"):
            yield json.loads(content)


def _sent(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = [_sent_image(part) if part["type"] == "image" else part for part in content]
    return {**message, "content": content}


def _sent_image(part: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(part["path"])
    kind = TYPES.get(path.suffix.lower(), "png")
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{content}"}}
