"""What an adapter may be called, and what the names in its file begin with."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from rankfold.errors import ConfigError

PREFIX = "base_model.model."
MAX_NAME = 200
# It becomes a module's name and a folder's: no dot, slash, backslash, colon or control character.
ADAPTER_NAME = re.compile(rf"[^./\\:\x00-\x1f\x7f]{{1,{MAX_NAME}}}")


def _is_torch_word(name: str) -> bool:
    return any(hasattr(holder, name) for holder in (nn.ModuleDict, nn.ParameterDict))


def check_adapter_name(name: str, taken: Collection[str]) -> None:
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name) or _is_torch_word(name):
        raise ConfigError(
            f"{name!r:.200} cannot name an adapter: a name is a word of up to {MAX_NAME} printable "
            "characters without dots and slashes, and not one of torch's own words"
        )
    if name in taken:
        raise ConfigError(
            f"the model has an adapter {name!r} already: it already exists; delete_adapter() it first"
        )
