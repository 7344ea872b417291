"""pytest plugin: bind ``peft`` and its submodules to rankfold, or to PEFT cut down to LoRA.

A name that the target lacks becomes a placeholder class, so that test files which name some forty methods
can be collected; tests that have a placeholder among their parameters are of other methods and fall away.
Every outcome is written to the file that CONFORMANCE_OUTCOMES names."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = os.environ["CONFORMANCE_TARGET"]
# Plain helpers that say what the machine has: PEFT's own serve both sides.
NEUTRAL = ("peft.import_utils", "peft.utils.transformers_weight_conversion")
placeholders: set[type] = set()
outcomes: dict[str, str] = {}


def placeholder(name: str) -> type:
    made = type(name, (), {"__init__": lambda self, *args, **options: None, "_is_placeholder": True})
    placeholders.add(made)
    return made


class Alias(types.ModuleType):
    """A module whose names are looked up by ``find`` and are placeholders where that finds none."""

    def __init__(self, name: str, find: Callable[[str], Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        self.__dict__["_find"] = find

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.__dict__["_find"](name)
        if value is None:  # a table of other methods is empty, anything else a class
            value = {} if name.isupper() else placeholder(name)
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """``import peft.x.y`` for whatever x.y gives an Alias of it."""

    def __init__(self, find: Callable[[str, str], Any]) -> None:
        self.find = find

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] == "peft":
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Alias(spec.name, lambda name: self.find(spec.name, name))

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def bind_rankfold() -> None:
    """``peft.a.b.name`` is ``rankfold.a.b.name`` if there is such a module, else ``rankfold.name``."""
    import rankfold

    neutral = {}
    for name in NEUTRAL:
        neutral[name] = importlib.import_module(name)
    version = sys.modules["peft"].__version__
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        del sys.modules[name]

    def find(module: str, name: str) -> Any:
        if module in neutral:
            return getattr(neutral[module], name)
        try:
            own = importlib.import_module(module.replace("peft", "rankfold", 1))
        except ImportError:
            own = rankfold
        found = getattr(own, name, None)
        return getattr(rankfold, name, None) if found is None else found

    sys.meta_path.insert(0, Finder(find))
    importlib.import_module("peft").__version__ = version


def bind_peft() -> None:
    """PEFT itself without the classes of its other methods."""
    import peft

    own = ("peft.tuners.lora", "peft.tuners.tuners_utils")

    def find(name: str) -> Any:
        value = getattr(peft, name, None)
        module = getattr(value, "__module__", "")
        other = isinstance(value, type) and module.startswith("peft.tuners.") and not module.startswith(own)
        return None if other else value

    alias = Alias("peft", find)
    alias.__path__, alias.__spec__, alias.__version__ = peft.__path__, peft.__spec__, peft.__version__  # type: ignore[assignment,attr-defined]
    sys.modules["peft"] = alias
    for name in ("ia3", "randlora", "road", "shadow"):
        sys.modules[f"peft.tuners.{name}"] = Alias(f"peft.tuners.{name}", lambda name: None)


def mentions_placeholder(value: Any, depth: int = 3) -> bool:
    if isinstance(value, type):
        return value in placeholders
    if type(value) in placeholders:
        return True
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    )
    return depth > 0 and any(mentions_placeholder(each, depth - 1) for each in inner)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    def is_foreign(item: Any) -> bool:
        parameters = getattr(item, "callspec", None)
        return parameters is not None and any(map(mentions_placeholder, parameters.params.values()))

    foreign = [item for item in items if is_foreign(item) or "regression" in item.keywords]
    config.hook.pytest_deselected(items=foreign)
    dropped = set(map(id, foreign))
    items[:] = [item for item in items if id(item) not in dropped]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: Any) -> None:
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["CONFORMANCE_OUTCOMES"]).write_text(json.dumps(outcomes))


if TARGET == "rankfold":
    bind_rankfold()
else:
    bind_peft()
