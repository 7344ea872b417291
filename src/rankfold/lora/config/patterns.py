"""Regular expressions from an adapter's config: tried out where they can be killed.

A pattern such as ``(.+)+!`` takes Python longer than the age of the universe on a name of forty letters,
and ``re`` cannot be interrupted.  A pattern that may do that is run first in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection

from rankfold.errors import AdapterError
from rankfold.lora.config.lora_config import LoraConfig

MAX_SECONDS = 2.0  # for all patterns of a config on all module names; ordinary ones take milliseconds
MAX_RUNS = 3  # so many ``.*`` in a pattern cost at most length ** 4 steps, and a name is short
MAX_PATTERNS = 20_000
RUN = re.compile(r"\.[*+]\??|\\d\+|\[0-9\]\+")
QUANTIFIERS = re.compile(r"[*+{]|(?<!\()\?")

TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(pattern, name)
"""


def check_patterns(config: LoraConfig, names: Collection[str]) -> None:
    """Raise AdapterError if the config's patterns are invalid, too many, or too slow on ``names``."""
    patterns = config_patterns(config)
    if len(patterns) > MAX_PATTERNS:
        raise AdapterError(f"the adapter's config has {len(patterns):,} patterns; no adapter has that many")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"the adapter's pattern {pattern[:200]!r} cannot be used: {error}") from error
    risky = [pattern for pattern in patterns if not is_quick(pattern)]
    if not risky:
        return
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        subprocess.run(
            command,
            input=json.dumps([risky, list(names)]).encode(),
            timeout=MAX_SECONDS,
            check=True,
            capture_output=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        shown = ", ".join(repr(pattern[:200]) for pattern in risky[:5])
        raise AdapterError(
            f"the adapter's patterns are too slow to be tried on this model's module names: {shown}"
        ) from error


def config_patterns(config: LoraConfig) -> list[str]:
    """Every regular expression in ``config``, spelt as it is matched."""
    whole = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    layers = config.layers_pattern or []
    listed = [layers] if isinstance(layers, str) else list(layers)
    keys = [*config.rank_pattern, *config.alpha_pattern]
    return [
        *whole,
        *(rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in listed),
        *(rf"(.*\.)?({key})$" for key in dict.fromkeys(keys)),
    ]


def is_quick(pattern: str) -> bool:
    """Whether ``pattern`` can be seen to take a time that is a small power of a name's length: it repeats
    nothing but single characters, and that a few times only."""
    key = pattern.removeprefix(r"(.*\.)?")
    rest, runs = RUN.subn("", key)
    return runs <= MAX_RUNS and not QUANTIFIERS.search(rest)


def is_named(entry: str, path: str) -> bool:
    """Whether ``entry`` is ``path`` or its dotted ending."""
    return path == entry or path.endswith(f".{entry}")
