"""Query, key and value rows that stand in one matrix, group by group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How a fused attention matrix orders its rows: for each key-value head the rows of its query heads,
    then one key head, then one value head, each of ``head_dim`` rows.

    InternLM2's ``attention.wqkv`` (modeling_internlm2.py, ``rearrange('(h gs d) z -> h gs d z')``).
    InternViT's ``attn.qkv`` is the same with one head as wide as the model."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many rows queries, keys and values have."""
        narrow = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, narrow, narrow

    @property
    def rows(self) -> int:
        """How many rows the fused matrix has."""
        return sum(self.sizes)

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (rows, ...) as queries (heads * head_dim, ...), keys and values (kv_heads * head_dim, ...)."""
        rest = fused.shape[1:]
        grouped = fused.reshape(self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim, *rest)
        query, key, value = (
            part.reshape(-1, *rest).contiguous() for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
        )
        return query, key, value

    def join(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The inverse of ``split``."""
        rest = query.shape[1:]
        parts = [part.reshape(self.kv_heads, -1, self.head_dim, *rest) for part in (query, key, value)]
        return torch.cat(parts, dim=1).reshape(self.rows, *rest)
