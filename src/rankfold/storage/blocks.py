"""The numbers in GGUF's blocks, by torch operations: each function is one block type's formula.

They take whole blocks, (blocks, bytes of a block) uint8, and fill ``out`` (blocks, numbers of a block)
float32 with the same bits that ``gguf.quants.dequantize`` gives: every product of a scale and a quantum
fits float32 exactly, so at most the one sum is rounded.  The layouts are those of llama.cpp,
ggml/src/ggml-common.h (block_q4_0 to block_q6_K) and ggml-quants.c."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # numbers that share a scale in Q4_K and Q5_K
GROUPS = 8  # of them in a block
EACH_BYTE = 0x0101010101010101
BIT_K_OF_BYTE_K = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as a signed number


def q4_0(blocks: Tensor, out: Tensor) -> None:
    quanta = nibbles(blocks[:, 2:], 16).view(torch.int8).sub_(8)
    out.copy_(quanta).mul_(half(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(nibbles(blocks[:, 4:], 16)).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: Tensor, out: Tensor) -> None:
    quanta = nibbles(blocks[:, 6:], 16).bitwise_or_(fifth_bits(blocks[:, 2:6]))
    out.copy_(quanta.view(torch.int8).sub_(16)).mul_(half(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    quanta = nibbles(blocks[:, 8:], 16).bitwise_or_(fifth_bits(blocks[:, 4:8]))
    out.copy_(quanta).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(half(blocks, 0))


def q4_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(nibbles(blocks[:, 16:], GROUP))
    scale_groups(blocks, out)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    quanta = nibbles(blocks[:, 48:], GROUP).view(-1, GROUPS, GROUP)
    high = blocks[:, 16:48].contiguous()  # bit g of byte i belongs to number i of group g
    for group in range(GROUPS):
        quanta[:, group].bitwise_or_((high >> group).bitwise_and_(1).mul_(16))
    out.copy_(quanta.view(out.shape))
    scale_groups(blocks, out)


def q6_k(blocks: Tensor, out: Tensor) -> None:
    quanta = nibbles(blocks[:, :128], 64).view(-1, 2, 4, GROUP)
    high = blocks[:, 128:192].reshape(-1, 2, GROUP)
    for pair in range(4):
        quanta[:, :, pair].bitwise_or_((high >> 2 * pair).bitwise_and_(3).mul_(16))
    out.copy_(quanta.view(out.shape).view(torch.int8).sub_(32))
    scales = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    out.view(-1, 16, 16).mul_(scales[:, :, None])


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte ``start`` of each block, (blocks, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def nibbles(packed: Tensor, run: int) -> Tensor:
    """The numbers 0 to 15 in ``packed`` (blocks, bytes): of each ``run`` bytes the low halves, then the
    high halves; (blocks, 2 * bytes) uint8."""
    packed = packed.contiguous().view(len(packed), -1, run)
    return torch.stack([packed & 15, packed >> 4], 2).view(len(packed), -1)


def fifth_bits(packed: Tensor) -> Tensor:
    """16 where a bit of ``packed`` (blocks, 4) is set, lowest first, else 0; (blocks, 32) uint8."""
    copies = packed.to(torch.int64).mul_(EACH_BYTE)  # each byte eight times
    return copies.bitwise_and_(BIT_K_OF_BYTE_K).view(torch.uint8).clamp_(max=1).mul_(16)


def scale_groups(blocks: Tensor, out: Tensor) -> None:
    """Give the quanta in ``out`` their group's scale and minimum: 12 bytes of two times eight 6-bit numbers.

    Of the first four groups a byte holds scale or minimum in its low six bits; its two high bits belong to
    a later group, whose low four bits are in the last four bytes."""
    scales, minima, rest = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([scales & 63, (rest & 15) | ((scales >> 2) & 48)], 1)
    minima = torch.cat([minima & 63, (rest >> 4) | ((minima >> 2) & 48)], 1)
    groups = out.view(-1, GROUPS, GROUP)
    groups.mul_((half(blocks, 0) * scales.float())[:, :, None])
    groups.sub_((half(blocks, 2) * minima.float())[:, :, None])
