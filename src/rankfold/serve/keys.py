"""The key that clients must send."""

from __future__ import annotations

import os

from rankfold.errors import ConfigError
from rankfold.serve.request import ServeRequest

KEY_VARIABLE = "RANKFOLD_API_KEY"
LEAST_KEY = 8  # characters


def key_of(asked: ServeRequest) -> str | None:
    """The key that clients must send.  Raises ConfigError if one is needed and there is none."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if asked.api_key_file is not None:
        try:
            key = asked.api_key_file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {asked.api_key_file}: {error}") from error
    if (key or asked.api_key_file) and (len(key) < LEAST_KEY or not key.isascii()):
        raise ConfigError(f"the key has {len(key)} characters; use at least {LEAST_KEY}, all of them ASCII")
    if not key and not asked.is_local:
        raise ConfigError(
            f"others can reach {asked.host}: put a key into {KEY_VARIABLE} or into a file "
            "(--api-key-file FILE), which clients send as Authorization: Bearer KEY"
        )
    return key or None
