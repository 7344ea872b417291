"""What is in the files of a base's weights, tensor by tensor, by the names that its model has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rankfold.compat import names_in_checkpoints, safetensors_files
from rankfold.errors import ModelError
from rankfold.models.base.content import Content, Contents
from rankfold.models.base.find import BaseSource
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tensors import gguf_contents
from rankfold.models.internvl.loading import native_readers
from rankfold.models.internvl.names import Layout


@contextmanager
def contents_of(source: BaseSource, model: Any, original: Layout | None) -> Iterator[Contents]:
    """What is in the files of ``source``, by the names of ``model``; ``original`` if they are those of an
    InternVL in its original layout.  Raises ModelError."""
    if source.gguf_file is not None:
        yield gguf_contents(read_gguf(source.gguf_file, words=False), model)
    elif original is not None:
        with native_readers(Path(source.location), original) as readers:
            yield {name: partial(_plain, read) for name, read in readers.items()}
    else:
        with _safetensors(source.location) as found:
            yield _by_names_of(model, found)


@contextmanager
def checkpoint_of(source: BaseSource, model: Any) -> Iterator[dict[str, tuple[str, Callable[[], Content]]]]:
    """What is in the files of ``source`` by their own keys, each with the name that ``model`` has for it:
    none for what is put together with others.  Raises ModelError."""
    if source.gguf_file is not None:
        found = gguf_contents(read_gguf(source.gguf_file, words=False), model)
        yield {name: (name, read) for name, read in found.items()}
        return
    found = {}
    for file in safetensors_files(source.location):
        with safe_open(file, framework="pt") as opened:
            found |= {key: partial(_alone, file, key) for key in opened.keys()}  # noqa: SIM118
    names = names_in_checkpoints(model, found)
    yield {key: ("" if made else name, found[key]) for key, (name, made) in names.items()}


def _alone(file: str, key: str) -> Content:
    """A tensor of a file that is not held open: what was read of it is given back with the tensor."""
    with safe_open(file, framework="pt") as opened:
        return Content(opened.get_tensor(key))


def _plain(read: Callable[[], Tensor]) -> Content:
    return Content(read())


def _by_names_of(model: Any, found: Contents) -> Contents:
    """``found`` by the names that ``model`` has for what older versions of transformers called otherwise.

    Raises ModelError for a tensor that would have to be put together from several."""
    renamed = {}
    for key, (name, is_made) in names_in_checkpoints(model, found).items():
        if is_made:
            raise ModelError(
                f"{key} must be put together with others, which held weights cannot; leave stored out"
            )
        renamed[name] = found[key]
    return renamed


@contextmanager
def _safetensors(location: str | Path) -> Iterator[Contents]:
    """What is in the safetensors files of a folder or hub model."""
    with ExitStack() as stack:
        files = safetensors_files(location)
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {key: _reader(file, key) for file in opened for key in file.keys()}  # noqa: SIM118


def _reader(file: Any, key: str) -> Callable[[], Content]:
    return lambda: Content(file.get_tensor(key))
