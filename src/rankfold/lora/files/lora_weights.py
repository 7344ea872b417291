"""The low-rank pair of each module as it stands in an adapter's file, and what can be done with it there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rankfold.errors import AdapterError
from rankfold.lora.algebra.factor_svd import svd_of_product
from rankfold.lora.config.lora_config import LoraConfig, changes_base
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.placing.targets import alpha_of

FACTOR = re.compile(r"(?P<path>.+?)\.(?P<key>lora_[A-Za-z_]+(?:\.weight|\.bias)?)")
A_KEYS, B_KEYS = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
EMBEDDINGS = ("embed_tokens", "tok_embeddings")


@dataclass(frozen=True)
class Pair:
    """``scale * B @ A`` is added to a weight (out, in); ``A`` (rank, in), ``B`` (out, rank).

    ``rows`` are further tensors of the adapter with one entry an output row, by their key: DoRA's
    magnitudes, the bias of B."""

    A: Tensor
    B: Tensor
    scale: float
    rows: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass
class Modules:
    """An adapter's tensors by what they are: pairs by module, and modules saved whole."""

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)


def sorted_out(tensors: Mapping[str, Tensor]) -> Modules:
    modules = Modules()
    for key, tensor in sorted(tensors.items()):  # a file has no order that is worth keeping
        name = key.removeprefix(PREFIX)
        found = FACTOR.fullmatch(name)
        if found:
            modules.pairs.setdefault(found["path"], {})[found["key"]] = tensor
        else:
            modules.saved[name] = tensor
    return modules


def pair_of(path: str, tensors: dict[str, Tensor], config: LoraConfig) -> Pair:
    a = next((tensors[key] for key in A_KEYS if key in tensors), None)
    b = next((tensors[key] for key in B_KEYS if key in tensors), None)
    if a is None or b is None:
        raise AdapterError(f"{path} has {', '.join(sorted(tensors))}, and not both factors")
    rows = {key: tensor for key, tensor in tensors.items() if key not in (*A_KEYS, *B_KEYS)}
    return Pair(a, b, config.scale(len(a), alpha_of(path, config)), rows)


def beside_pairs(config: LoraConfig) -> list[str]:
    """What a config asks for that pairs of modules alone do not say."""
    found = [
        f"{name} is set, which pairs of modules do not say"
        for name in ("layer_replication", "target_parameters", "trainable_token_indices")
        if getattr(config, name)
    ]
    if changes_base(config.init_lora_weights):
        found.append(
            f"init_lora_weights is {config.init_lora_weights!r}, which changes the base; save the adapter "
            "with path_initial_model_for_weight_conversion first"
        )
    return [*found, *not_plain(config)]


def is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS


def pair_tensors(path: str, pair: Pair) -> dict[str, Tensor]:
    """The tensors of a pair by their keys in PEFT's file."""
    embedding = is_embedding(path)
    own = {A_KEYS[embedding]: pair.A, B_KEYS[embedding]: pair.B, **pair.rows}
    return {f"{PREFIX}{path}.{key}": tensor for key, tensor in own.items()}


def padded(pair: Pair, rank: int) -> Pair:
    """The same pair with zeros up to ``rank``; it computes what it did.  Exact."""
    more = rank - pair.rank
    if more <= 0:
        return pair
    a = torch.cat([pair.A, pair.A.new_zeros(more, pair.A.shape[1])])
    b = torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], more)], 1)
    return replace(pair, A=a, B=b)


def of_rank(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The nearest pair of ``rank``, and its error: what is lost of ``B @ A`` by Frobenius norm, relative.

    By the singular values of the product, in float64 (Eckart & Young 1936)."""
    if rank >= pair.rank:
        return pair, 0.0
    u, s, v = svd_of_product(pair.B, pair.A)
    whole = float(s.square().sum())
    error = (float(s[rank:].square().sum()) / whole) ** 0.5 if whole else 0.0
    root = s[:rank].sqrt()
    b = (u[:, :rank] * root).to(pair.B.dtype)
    a = (v[:, :rank] * root).T.to(pair.A.dtype)
    return replace(pair, A=a.contiguous(), B=b.contiguous()), error
