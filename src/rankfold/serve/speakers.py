"""Who answers under which name: the base and its adapters, which come and go while the server runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError, RankfoldError, nearest
from rankfold.lora import LoraConfig
from rankfold.models.answering.answers import stops_of
from rankfold.models.answering.loop import Loop
from rankfold.models.base.base import Base
from rankfold.models.base.several import BASE, Voice, one_more
from rankfold.peft_surface.mixed_batch import BASE as NO_ADAPTER
from rankfold.serve.engine import EndedError, Engine
from rankfold.serve.refusing import RefusedError


@dataclass(frozen=True, eq=False)
class Speaker:
    """A name under which the server answers; ``parent`` is the base's, None for the base itself."""

    name: str
    base: Base
    adapter: str
    parent: str | None = None
    folder: Path | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def stops(self) -> frozenset[int]:
        return stops_of(self.base)

    @cached_property
    def words(self) -> Any:
        """llguidance's view of the tokenizer: the bytes of each token."""
        return _words(self.base.tokenizer.backend_tokenizer.to_str(), tuple(sorted(self.stops)))

    def described(self) -> dict[str, Any]:
        """As OpenAI lists a model."""
        root = self.parent or self.name
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "rankfold",
            "root": root,
            "parent": self.parent,
        }


@lru_cache(maxsize=4)
def _words(spelt: str, stops: tuple[int, ...]) -> Any:
    """Of a tokenizer as JSON, which adapters mostly share."""
    from llguidance import LLTokenizer

    return LLTokenizer(spelt, eos_token=list(stops))


class Speakers:
    """The speakers of one model, whose base goes by its own name and by "base".  Raises ConfigError for an
    adapter of the base's name."""

    def __init__(self, voices: Mapping[str, Voice], folders: Mapping[str, Path]) -> None:
        self.base = voices[BASE].base
        self.base_name = self.base.source.name
        if self.base_name in folders:
            raise ConfigError(f"--adapter {self.base_name}=...: that is the base's name; choose another")
        named = self.base.model.named_parameters()
        self.parameters = sum(own.numel() for name, own in named if "lora_" not in name)
        self._numbers = count(len(voices))
        self.by_name = {self.base_name: Speaker(self.base_name, self.base, NO_ADAPTER)}
        for name, voice in voices.items():
            if voice.adapter is not None:
                self._add(voice, folders[name])

    def find(self, name: str) -> Speaker:
        """Raises RefusedError for a name that nobody has."""
        found = self.by_name.get(self.base_name if name == BASE else name)
        if found is None:
            near = nearest(name, self.by_name)
            there = ", ".join(list(self.by_name)[:20])
            raise RefusedError(
                404, f"no model is called {name!r:.200}{near}; there are {there}", "model_not_found", "model"
            )
        return found

    async def load(self, engine: Engine, name: str, folder: Path) -> Speaker:
        """Load the adapter in ``folder`` under ``name``; if that is taken, those who asked it before are
        answered by the one that had it.  Raises RefusedError for one that cannot be loaded."""
        if name in (BASE, self.base_name):
            raise RefusedError(409, f"{name!r} is the base's name", param="lora_name")
        known_as = f"voice{next(self._numbers)}"

        def call(loop: Loop) -> Voice:
            if LoraConfig.from_pretrained(folder).alora_invocation_tokens:
                raise ConfigError(
                    "an activated adapter (aLoRA) cannot be served yet; rankfold chat talks to it"
                )
            found = one_more(self.base, name, known_as, folder)
            self.base = replace(self.base, model=found.base.model)
            loop.company.model = found.base.model
            return found

        try:
            voice = await asyncio.wrap_future(engine.change(call))
        except RankfoldError as error:
            raise RefusedError(400, str(error), param="lora_path") from error
        except EndedError as error:
            raise RefusedError(503, str(error)) from error
        before = self.by_name.get(name)
        self._add(voice, folder)
        if before is not None:
            self._retire(engine, before)
        return self.by_name[name]

    def unload(self, engine: Engine, name: str) -> None:
        """From now on nobody is called ``name``; its adapter goes when its last answer is there."""
        found = self.find(name)
        if found.parent is None:
            raise RefusedError(409, f"{name!r} is the base, which stays", param="lora_name")
        del self.by_name[name]
        self._retire(engine, found)

    def _add(self, voice: Voice, folder: Path) -> None:
        assert voice.adapter is not None
        self.by_name[voice.name] = Speaker(voice.name, voice.base, voice.adapter, self.base_name, folder)

    def _retire(self, engine: Engine, gone: Speaker) -> None:
        def call(loop: Loop) -> None:
            loop.kept.forget(gone.adapter)
            loop.company.forget(gone.adapter)
            self.base.model.delete_adapter(gone.adapter)

        engine.change(call, unused=gone.adapter)
