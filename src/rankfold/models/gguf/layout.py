"""What a model is as a GGUF file: its keys, its tensors' names and their types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rankfold.errors import ModelError
from rankfold.models.base.base import Base
from rankfold.models.gguf.architectures import ARCHITECTURES, TENSORS_APART, Architecture
from rankfold.models.gguf.config_keys import config_keys
from rankfold.models.gguf.file import GgufFile, read_gguf
from rankfold.models.gguf.rope import rope_tensors
from rankfold.models.gguf.tensors import tensor_names
from rankfold.models.gguf.tokenizer import KEY, end_ids
from rankfold.models.gguf.words import tokenizer_keys
from rankfold.models.gguf.writing import Key, keys_of_file

TEMPLATE = "tokenizer.chat_template"
END_KEYS = (f"{KEY}eos_token_id", f"{KEY}eot_token_id", f"{KEY}eom_token_id")


@dataclass(frozen=True)
class GgufLayout:
    """``names``: the parameter of transformers' model for each tensor; ``kinds`` their types if the base is a
    GGUF file, which is ``file``; ``apart`` are tensors that are no parameter."""

    architecture: str
    config: Any
    names: Mapping[str, str]
    keys: Mapping[str, Key]
    kinds: Mapping[str, str]
    apart: Mapping[str, np.ndarray[Any, Any]]
    file: GgufFile | None = None

    @property
    def rules(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    def with_parameters(self, parameters: Collection[str]) -> GgufLayout:
        """With tensors of their own for these ``parameters`` too."""
        more = names_of(self.architecture, self.config, parameters)
        return replace(self, names={**self.names, **more})

    @classmethod
    def of(cls, base: Base, parameters: Collection[str]) -> GgufLayout:
        """Of a base, whose model may have no weights, and the names of its own ``parameters``.

        Raises ModelError if llama.cpp was not compared with its architecture."""
        if base.source.gguf_file is None:
            return _of_config(base, parameters)
        file = read_gguf(base.source.gguf_file)
        _known(file.architecture, file.architecture in ARCHITECTURES)
        names = names_of(file.architecture, base.model.config, parameters)
        kinds = {name: tensor.kind for name, tensor in file.tensors.items()}
        apart = {name: file.data(name) for name in TENSORS_APART if name in file.tensors}
        keys, known = keys_of_file(file), {name: names[name] for name in file.tensors if name in names}
        return cls(file.architecture, base.model.config, known, keys, kinds, apart, file)

    def answering(self, base: Base, stops: frozenset[int]) -> GgufLayout:
        """With the template of ``base``, and with ``stops`` that end an answer."""
        keys = dict(self.keys)
        template = base.tokenizer.chat_template
        if isinstance(template, str):
            keys[TEMPLATE] = Key.of(template)
        words = {name: key.value for name, key in keys.items()}
        known = end_ids(GgufFile(Path(), words, {}))
        places = (name for name in END_KEYS if name not in keys)
        keys |= {name: Key.of(stop) for name, stop in zip(places, sorted(stops - {*known}), strict=False)}
        return replace(self, keys=keys)


def architecture_of(config: Any) -> str:
    """GGUF's name of the architecture of transformers' ``config``.  Raises ModelError."""
    named = {rules.model_type: name for name, rules in ARCHITECTURES.items()} | {"mistral": "llama"}
    name = named.get(config.model_type)
    _known(config.model_type, name is not None)
    return str(name)


def _known(name: str, is_known: bool) -> None:
    if not is_known:
        raise ModelError(
            f"a {name} is not written as GGUF here; compared with llama.cpp are {', '.join(ARCHITECTURES)}"
        )


def _of_config(base: Base, parameters: Collection[str]) -> GgufLayout:
    config = base.model.config
    architecture = architecture_of(config)
    keys = {name: Key.of(value) for name, value in config_keys(config, architecture).items()}
    keys |= {name: Key.of(value) for name, value in tokenizer_keys(base.tokenizer, config.vocab_size).items()}
    names = names_of(architecture, config, parameters)
    return GgufLayout(architecture, config, names, keys, {}, rope_tensors(config))


def names_of(architecture: str, config: Any, parameters: Collection[str]) -> dict[str, str]:
    names = tensor_names(architecture, config, parameters)
    if lost := [parameter for parameter, name in names.items() if name is None]:
        raise ModelError(f"GGUF has no name for {lost[0]} of a {architecture}")
    return {str(name): parameter for parameter, name in names.items()}
