"""The configs inside a ``LoraConfig``."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from rankfold.errors import ConfigError
from rankfold.lora.config.data_starts import DATA_STARTS, CordaConfig, EvaConfig, LoftQConfig
from rankfold.lora.config.sub_config import SubConfig, sub_config
from rankfold.lora.config.variant_configs import VARIANTS


def read_sub_configs(config: Any) -> list[str]:
    """Give ``config`` its own copy of each sub-config, as PEFT keeps it, and say what is wrong with them.

    One that its ``init_lora_weights`` has no use for is told; PEFT drops that of LoftQ."""
    problems = []
    wanted: dict[str, tuple[str | None, type[SubConfig]]] = {
        name: (None, kind) for name, kind in VARIANTS.items() if kind is not None
    }
    wanted |= {name: (start, kind) for start, (name, kind) in DATA_STARTS.items()}
    for name, (start, kind) in wanted.items():
        given = getattr(config, name)
        if start is not None:
            given = _given_for(start, name, kind, config)
        if given is None or (kind is LoftQConfig and given == {}):
            setattr(config, name, given)
            continue
        try:
            read: Any = sub_config(kind, given)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        if kind is LoftQConfig:  # PEFT keeps this one as the dictionary that was given
            read = dict(given) if isinstance(given, dict) else dataclasses.asdict(read)
        setattr(config, name, read)
    return problems


def _given_for(start: str, name: str, kind: type[SubConfig], config: Any) -> Any:
    """What ``config`` has for a start from data, with PEFT's defaults where the start is asked for."""
    given, used = getattr(config, name), config.init_lora_weights == start
    if given and not used:
        warnings.warn(
            f"`{name}` specified but will be ignored when `init_lora_weights` is not {start!r}.", stacklevel=6
        )
        return {} if kind is LoftQConfig else given
    if given is None and used and kind in (EvaConfig, CordaConfig):
        warnings.warn(
            f"`init_lora_weights` is {start!r} but `{name}` is not specified. Using default "
            f"{'EVA' if kind is EvaConfig else 'CorDA'} config.",
            stacklevel=6,
        )
        return {}
    return given
