"""The forms a frozen matrix can be held in: each row a number of whole blocks of bytes.

A held matrix is uint8 (rows, bytes of a row), whatever its form, so rows can be picked and put into
another order as they are, and no ``model.to(dtype)`` rounds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from rankfold.errors import ModelError
from rankfold.storage import blocks

BITS = 8  # of a byte
PIECE = 1 << 21  # numbers expanded at a time on a CPU: more leave its cache, fewer wait more for each other


@dataclass(frozen=True)
class Form:
    """``numbers`` of a block, 0 for a whole row; a block is ``head`` bytes and ``bits`` for each number.

    ``fill(blocks, out)`` expands blocks (n, bytes) uint8 into out (n, numbers) float32."""

    name: str
    numbers: int
    head: int
    bits: int
    fill: Callable[[Tensor, Tensor], None] = field(compare=False)

    def block(self, columns: int) -> tuple[int, int]:
        """Numbers and bytes of a block in a row of ``columns`` numbers.

        Raises ModelError if such a row is no whole number of blocks."""
        numbers = self.numbers or columns
        if columns % numbers or not columns:
            raise ModelError(
                f"a row of {columns} numbers cannot be held as {self.name}, in blocks of {numbers}"
            )
        return numbers, self.head + numbers * self.bits // BITS

    def row_bytes(self, columns: int) -> int:
        """The bytes of a row of ``columns`` numbers.  Raises ModelError as ``block`` does."""
        numbers, size = self.block(columns)
        return columns // numbers * size

    def check(self, held: Tensor, columns: int) -> None:
        """Raise ModelError unless ``held`` is a contiguous matrix of rows of ``columns`` numbers."""
        wanted = self.row_bytes(columns)
        if held.dtype != torch.uint8 or held.dim() != 2 or held.shape[1] != wanted:  # noqa: PLR2004
            raise ModelError(
                f"a matrix of {columns} columns held as {self.name} is uint8 (rows, {wanted}); "
                f"got {held.dtype} {tuple(held.shape)}"
            )
        if not held.is_contiguous():
            raise ModelError(f"a matrix held as {self.name} must be contiguous")


@torch.no_grad()
def expand(held: Tensor, form: Form, out: Tensor) -> Tensor:
    """Fill ``out`` (rows, columns) with the numbers of ``held`` (rows, bytes of a row), and return it.

    ``out`` is contiguous; in any dtype but float32 the numbers are rounded once."""
    numbers, size = form.block(out.shape[-1])
    source, target = held.view(-1, size), out.view(-1, numbers)
    step = max(1, PIECE // numbers) if out.device.type == "cpu" else max(1, len(source))
    for start in range(0, len(source), step):
        piece = target[start : start + step]
        if out.dtype == torch.float32:
            form.fill(source[start : start + step], piece)
        else:
            wide = torch.empty(piece.shape, device=out.device)
            form.fill(source[start : start + step], wide)
            piece.copy_(wide)
    return out


def expanded(held: Tensor, form: Form, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of ``held``, (rows, columns), in memory of their own."""
    return expand(held, form, torch.empty(len(held), columns, dtype=dtype, device=held.device))


def numbers_at(held: Tensor, form: Form, columns: int, rows: Tensor, places: Tensor) -> Tensor:
    """The number at ``places[i]`` of row ``rows[i]`` for each i, float32; only their blocks are expanded."""
    numbers, size = form.block(columns)
    found = held.view(len(held), -1, size)[rows, places // numbers]
    return expanded(found, form, numbers).gather(1, (places % numbers)[:, None]).squeeze(1)


def _fill_int8(held: Tensor, out: Tensor) -> None:
    scale = held[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)
    out.copy_(held[:, 4:].view(torch.int8)).mul_(scale)


def _fill_plain(dtype: torch.dtype, held: Tensor, out: Tensor) -> None:
    out.copy_(held.view(dtype))


def to_int8(weight: Tensor) -> Tensor:
    """``weight`` (rows, columns) as INT8: a float32 scale, the largest magnitude of the row / 127, and one
    signed byte for each number, the nearest (ties to even).  Raises ModelError if one is not finite."""
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise ModelError("a weight with NaN or infinite values cannot be held as INT8")
    scale = wide.abs().amax(1, keepdim=True) / 127
    quanta = torch.where(scale > 0, wide / scale, 0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), quanta.view(torch.uint8)], 1)


def to_bf16(weight: Tensor) -> Tensor:
    """``weight`` (rows, columns) as BF16, rounded to the nearest (ties to even), in memory of its own."""
    return weight.to(torch.bfloat16, copy=True).contiguous().view(torch.uint8)


INT8 = Form("INT8", 0, 4, 8, _fill_int8)
BF16 = Form("BF16", 1, 0, 16, partial(_fill_plain, torch.bfloat16))
# GGUF's blocks made from a finer weight: unlike those of a file, they are not what the base is.
ROUNDED_Q4_0 = Form("rounded Q4_0", 32, 2, 4, blocks.q4_0)
# By GGUF's names, but for INT8, which is no block of GGUF.
FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            INT8,
            BF16,
            Form("F16", 1, 0, 16, partial(_fill_plain, torch.float16)),
            Form("Q4_0", 32, 2, 4, blocks.q4_0),
            Form("Q4_1", 32, 4, 4, blocks.q4_1),
            Form("Q5_0", 32, 2, 5, blocks.q5_0),
            Form("Q5_1", 32, 4, 5, blocks.q5_1),
            Form("Q8_0", 32, 2, 8, blocks.q8_0),
            Form("Q4_K", 256, 16, 4, blocks.q4_k),
            Form("Q5_K", 256, 16, 5, blocks.q5_k),
            Form("Q6_K", 256, 18, 6, blocks.q6_k),
        )
    }
)
