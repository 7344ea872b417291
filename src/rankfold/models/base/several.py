"""One base with several adapters on it, each with the words and the template that it was trained with."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from rankfold.errors import ConfigError, bullet_list
from rankfold.lora import LoraConfig
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, Fault
from rankfold.models.adapters.convert import natively_named
from rankfold.models.base.base import Base
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.fitting import fit_to_adapter
from rankfold.models.base.image_text import is_internvl
from rankfold.models.base.load import load_base
from rankfold.models.base.precision import choose_precision, default_device
from rankfold.models.base.tokens import with_tokens
from rankfold.models.choices import ModelRequest
from rankfold.peft_surface import PeftModel

BASE = "base"  # what the model without an adapter is called


@dataclass(frozen=True)
class Voice:
    """The base by itself, or with the adapter that its model knows as ``adapter``."""

    name: str
    base: Base
    adapter: str | None = None

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within the block the model computes what this voice says."""
        model = self.base.model
        if self.adapter is not None:
            model.set_adapter(self.adapter, inference_mode=True)
        alone = self.adapter is None and isinstance(model, PeftModel)
        with model.disable_adapter() if alone else nullcontext():
            yield


def load_several(adapters: Mapping[str, Path], asked: ModelRequest) -> dict[str, Voice]:
    """A voice for each of ``adapters``, by their names, and BASE; all over one model, which is that of
    ``asked``, else the adapters' own.

    Raises ConfigError if they belong to different bases, and what ``load_tuned`` raises."""
    allow = cast(list[Fault], asked.allow)
    for folder in adapters.values():
        AdapterSource.of(folder, {"allow": allow})  # a misspelt fault is told before the base is loaded
    named = {name: LoraConfig.from_pretrained(folder) for name, folder in adapters.items()}
    base = _base(
        _model_of({name: config.base_model_name_or_path for name, config in named.items()}, asked), asked
    )
    voices = {BASE: Voice(BASE, base)}
    for number, (name, folder) in enumerate(adapters.items()):
        voices[name] = one_more(base, name, f"voice{number}", folder, allow)
        base = replace(base, model=voices[name].base.model)
    return {name: replace(each, base=replace(each.base, model=base.model)) for name, each in voices.items()}


def one_more(base: Base, name: str, known_as: str, folder: Path, allow: Collection[Fault] = ()) -> Voice:
    """The voice of the adapter in ``folder`` on ``base``, whose model knows it as ``known_as`` from now on:
    the model of what is given, with which other voices go on.  Raises what ``load_tuned`` does."""
    read = base.reading_by(copy.deepcopy(base.tokenizer))
    fitted = fit_to_adapter(read, folder, AdapterMetadata.read(folder), allow)
    model = base.model
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    other = natively_named(folder, base.source.name) if is_internvl(plain) else nullcontext(folder)
    with other as place:
        if isinstance(model, PeftModel):
            model.load_adapter(place, known_as, allow=allow)
        else:
            model = PeftModel.from_pretrained(model, place, known_as, allow=allow)
    return Voice(name, replace(fitted, model=model.eval()), known_as)


def _model_of(named: Mapping[str, str | None], asked: ModelRequest) -> str:
    if asked.model or not named:
        return asked.model or DEFAULT_MODEL
    bases = {*named.values()}
    if len(bases) > 1 or None in bases:
        told = [f"{name}: {base or 'it names none'}" for name, base in named.items()]
        raise ConfigError(bullet_list("the adapters do not name one base; name it with --model:", told))
    return str(bases.pop())


def _base(name: str, asked: ModelRequest) -> Base:
    precision = choose_precision(asked.precision, default_device()) if asked.precision else None
    base = load_base(name, precision, asked.stored)
    if precision and precision.cost:
        base = base.noting([precision.cost])
    return base.reading_by(with_tokens(base.tokenizer, asked.eos_token, ())) if asked.eos_token else base
