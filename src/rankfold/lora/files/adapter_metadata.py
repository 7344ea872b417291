"""``rankfold.json``: what rankfold must know of an adapter and PEFT's files have no room for."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from rankfold.errors import AdapterError
from rankfold.files import write_whole
from rankfold.lora.config.strict_json import read_json_object
from rankfold.lora.files.fingerprint import BaseFingerprint

METADATA_NAME = "rankfold.json"
SCHEMA_VERSION = 4  # 1 knew prompt_style and base_description, 2 no image_tiles, 3 no eos_token, as_tokens
MAX_METADATA_BYTES = 1_000_000

Kind = TypeVar("Kind")
PromptStyle = Literal["chat", "plain"]
log = logging.getLogger("rankfold")


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """Facts of one adapter.

    ``prompt_style``: "chat" if it was trained in the chat template, "plain" if on running text.
    ``chat_template``: the name of the template that rankfold gave a base without one, else empty.
    ``tokenizer``: sha256 of the vocabulary and of the chat template it was trained with, if given.
    ``versions``: of the libraries that wrote it.  ``sha256``: of the two files beside this one.
    ``base``: the fingerprint of the base that it belongs to.
    ``image_tiles``: into how many tiles an image was cut at most, None if images were not cut or not seen.
    ``eos_token``: the end of a text that the user named.  ``as_tokens``: special tokens that were tokens
    where a row spelled them."""

    prompt_style: PromptStyle = "chat"
    base_description: str = ""
    chat_template: str = ""
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    base: BaseFingerprint | None = None
    image_tiles: int | None = None
    eos_token: str = ""
    as_tokens: Sequence[str] = ()
    schema_version: int = SCHEMA_VERSION

    def sealed(self, files: Mapping[str, bytes], base: BaseFingerprint | None) -> AdapterMetadata:
        """These facts with the versions of now, the hashes of ``files`` and the fingerprint."""
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        return replace(self, versions=versions(), sha256=sums, base=base, schema_version=SCHEMA_VERSION)

    def write(self, folder: Path) -> None:
        write_whole(folder / METADATA_NAME, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> AdapterMetadata:
        """The facts of an adapter folder; the defaults where it was written by something else.

        Raises AdapterError for a damaged file or one of a newer rankfold."""
        path = folder / METADATA_NAME
        if not path.is_file():
            return cls()
        facts = None
        try:
            content = read_json_object(path, MAX_METADATA_BYTES)
            version = _of(int, content.pop("schema_version"))
            if version <= SCHEMA_VERSION:
                facts = cls(**_checked(content))
        except (KeyError, TypeError, ValueError, AdapterError) as error:
            hint = "remove it to load the adapter without it"
            raise AdapterError(f"{path} is damaged ({error!r}); {hint}") from error
        if facts is None:
            raise AdapterError(f"{path} was written by a newer rankfold (schema {version}); update rankfold")
        return facts


def versions() -> dict[str, str]:
    """The versions of what takes part in writing an adapter; transformers only if it is in use."""
    found = {"rankfold": importlib.import_module("rankfold").__version__, "torch": str(torch.__version__)}
    transformers = sys.modules.get("transformers")
    return found if transformers is None else found | {"transformers": str(transformers.__version__)}


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of AdapterMetadata in ``content``.  Raises KeyError, TypeError or ValueError."""
    style, base = content["prompt_style"], content.get("base")
    if style not in get_args(PromptStyle):
        raise ValueError(f"prompt_style must be 'chat' or 'plain', got {style!r}")
    facts: dict[str, Any] = {
        "prompt_style": style,
        "base_description": _of(str, content.get("base_description", "")),
        "chat_template": _of(str, content.get("chat_template", "")),
        "base": None,
    }
    tiles = content.get("image_tiles")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise ValueError(f"image_tiles must be a number from 1, got {tiles!r}")
    facts["image_tiles"] = tiles
    facts["eos_token"] = _of(str, content.get("eos_token", ""))
    facts["as_tokens"] = tuple(_of(str, word) for word in _of(list, content.get("as_tokens", [])))
    for name in ("tokenizer", "versions", "sha256"):
        facts[name] = _texts(content.get(name, {}))
    if base is not None:
        facts["base"] = BaseFingerprint(**_texts(base))
    return facts


def _texts(value: object) -> dict[str, str]:
    return {key: _of(str, text) for key, text in _of(dict, value).items()}


def _of(kind: type[Kind], value: object) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
