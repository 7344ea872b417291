"""Packed rows kept apart by attending row by row, through transformers' attention interface.

On a CPU a masked attention computes every pair of tokens of a block and then hides most of them. The rows
are read off the mask that the model itself has made, so nothing is assumed of the model: a sliding window, a
prefix that sees itself, or a padded batch keep the mask that they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rankfold.compat import attention_of, sdpa
from rankfold.kernels.rows_apart import Rows, attention_of_rows, rows_of

NAME = "rankfold_rows_apart"
REPLACED = "sdpa"  # transformers' choice that it stands in for

_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of each mask: made once, seen by every layer


def attend_rows_apart(model: Any) -> str:
    """Let ``model`` attend to packed rows one by one from now on; why it does not, or an empty string.

    Meant for CPUs; on a GPU transformers' own choice (flash or flex attention) knows the rows by itself.
    A model with attention that torch's kernel does not compute (soft-capped, with sinks) keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    chosen = attention_of(model.config)
    if chosen == NAME:
        return ""
    if model.device.type != "cpu":
        return f"on {model.device.type} the attention is the one that transformers chooses"
    if chosen != REPLACED:
        return f"the model computes its attention by {chosen}, which has no form for rows apart"
    AttentionInterface.register(NAME, rows_apart_attention)
    AttentionMaskInterface.register(NAME, sdpa()[1])
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(NAME)
    return "" if attention_of(model.config) == NAME else "the model's attention cannot be replaced"


def keep_out_of_programs() -> None:
    """Let torch.compile leave this attention alone: the rows differ in every block, so there is no one
    program of it.  Said only where something is compiled, as saying it loads the whole compiler."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(rows_apart_attention))


def rows_apart_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, row by row where ``attention_mask`` holds several rows apart."""
    rows = _rows_of(module, query, key, attention_mask, options)
    if rows is None:
        found: tuple[Tensor, None] = sdpa()[0](module, query, key, value, attention_mask, **options)
        return found
    dropout, scaling = options.get("dropout", 0.0), options.get("scaling")
    return attention_of_rows(query, key, value, rows, scaling, dropout), None


def _rows_of(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Rows | None:
    """The rows of a packed block, or the one row that is there without a mask; None for anything else."""
    tokens = query.shape[2]
    if len(query) != 1 or key.shape[2] != tokens:
        return None
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")):
        return None
    if mask is None:
        given = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if given is None else given
        return Rows([tokens], [None]) if causal and tokens > 1 else None
    if mask.dtype != torch.bool or mask.shape != (1, 1, tokens, tokens):
        return None
    if mask not in _rows:
        _rows[mask] = rows_of(mask[0, 0])
    rows: Rows = _rows[mask]
    return rows if len(rows.lengths) > 1 else None
