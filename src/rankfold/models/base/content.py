"""A tensor as a file holds it: numbers, or GGUF's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import ModelError
from rankfold.storage.forms import FORMS, INT8, Form, expanded

GGUF_FORMS = [name for name in FORMS if name != INT8.name]


@dataclass(frozen=True)
class Content:
    """A tensor of a file: numbers of any float dtype, or if it has a ``kind``, the rows' bytes, uint8
    (rows, bytes of a row), in GGUF's type of that name."""

    data: Tensor
    kind: str | None = None

    def numbers(self) -> Tensor:
        if self.kind is None:
            return self.data
        form = FORMS.get(self.kind)
        if form is not None:
            numbers, size = form.block(form.numbers)
            return expanded(self.data, form, self.data.shape[1] // size * numbers)
        from gguf import GGMLQuantizationType, dequantize

        return torch.from_numpy(dequantize(self.data.numpy(), GGMLQuantizationType[self.kind]))

    def as_it_is(self) -> tuple[Form, Tensor]:
        """The form of the bytes, and the bytes.  Raises ModelError if there is no such form."""
        if self.kind is None or self.kind not in FORMS:
            raise ModelError(
                f"{self.kind} is none of the types that can be kept ({', '.join(GGUF_FORMS)}); "
                "take stored='bfloat16' or 'int8', or leave it out"
            )
        return FORMS[self.kind], self.data


Contents = Mapping[str, Callable[[], Content]]
