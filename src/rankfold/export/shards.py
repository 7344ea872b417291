"""A model's weights as safetensors files, written as the tensors come."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import OutputError

INDEX = "model.safetensors.index.json"


class Shards:
    """Files of up to ``most`` bytes in ``folder``; what is held is one of them."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.held: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.total = 0

    def add(self, key: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and size + sum(t.numel() * t.element_size() for t in self.held.values()) > self.most:
            self._write()
        self.held[key] = tensor.contiguous()
        self.total += size
        if size >= self.most:
            self._write()

    def finish(self) -> None:
        """Give the files their names, and write which tensor is in which."""
        if self.held or not self.files:
            self._write()
        count = len(self.files)
        names = [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        for place, name in enumerate(names):
            self._part(place).rename(self.folder / name)
        places = {key: name for keys, name in zip(self.files, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, place: int) -> Path:
        return self.folder / f"part-{place}.safetensors"

    def _write(self) -> None:
        part = self._part(len(self.files))
        part.touch()
        mode = part.stat().st_mode  # which others may read; safetensors' own files they may not
        try:
            save_file(self.held, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"cannot write the weights into {self.folder.parent}: {error}") from error
        part.chmod(mode)
        self.files.append([*self.held])
        self.held = {}
