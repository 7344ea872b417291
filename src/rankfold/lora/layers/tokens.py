"""``trainable_token_indices``: an adapter that trains chosen rows of an embedding and no others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.base import HALF_DTYPES, AdapterLayer, AuxiliaryLayer, cast_merged
from rankfold.lora.layers.registry import adapt, base_modules

INPUT_NAME = "embed_tokens"  # the input embedding of a model that cannot say which one it is; PEFT's default


class TokenIndex(nn.Module):
    """Which rows of a vocabulary one adapter has: ``index`` (n), in the order of its rows."""

    def __init__(self, indices: list[int], padding: int | None, device: torch.device) -> None:
        super().__init__()
        self.indices = list(indices)
        # The padding row is read, and never trained by way of the input: nn.Embedding's rule.
        self.padding = self.indices.index(padding) if padding in self.indices else None
        index = torch.tensor(self.indices, device=device)
        sorted_index, order = index.sort()
        for name, values in (("index", index), ("sorted_index", sorted_index), ("order", order)):
            self.register_buffer(name, values, persistent=False)

    index: Tensor
    sorted_index: Tensor
    order: Tensor

    def read(self, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Which of ``ids`` (...) have one of ``rows`` (n, D), as bools (..., 1), and these rows (..., D);
        those of the other ids are arbitrary."""
        ids = ids.to(self.sorted_index.dtype).contiguous()
        place = torch.searchsorted(self.sorted_index, ids).clamp(max=len(self.indices) - 1)
        hits = self.sorted_index[place] == ids
        return hits.unsqueeze(-1), F.embedding(self.order[place], rows, self.padding).to(dtype)


class TokenAdapter(nn.Module):
    """The rows of all adapters: ``trainable_tokens_delta.<adapter>`` (n, D), in spite of PEFT's name for
    it not differences but values."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices = nn.ModuleDict()

    @property
    def trainable_tokens_original(self) -> nn.ParameterDict:
        """PEFT keeps the base's rows here; they are in the base."""
        return self.trainable_tokens_delta


class TokenLayer(AuxiliaryLayer):
    """An embedding, or an output head, some rows of whose weight belong to an adapter.

    Adds ``token_adapter.trainable_tokens_delta.<adapter>`` to the state dict; in the file the adapter's
    name is left out.  Reading ``weight`` gives the base's, not the changed one as in PEFT.
    A layer that shares its weight with another follows that one (``leader``) and holds no rows."""

    added: ClassVar[tuple[str, ...]] = ("token_adapter", "_names", *AdapterLayer.added)

    weight: Tensor
    token_adapter: TokenAdapter
    _names: list[str]

    def start(self) -> None:
        super().start()
        self.token_adapter, self._names = TokenAdapter(), []

    def add_rows(self, name: str, indices: list[int], *, widen: bool) -> None:
        """Add an adapter whose rows start as the base's; float32 for a half-precision base if ``widen``."""
        weight = self._originals_in_place()
        rows = weight[torch.tensor(indices, device=weight.device)].clone()
        rows = rows.float() if widen and rows.dtype in HALF_DTYPES else rows
        padding = getattr(self, "padding_idx", None)
        self.token_adapter.token_indices[name] = TokenIndex(indices, padding, rows.device)
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(rows, requires_grad=False)
        self._names.append(name)

    def follow(self, name: str, leader: TokenLayer) -> None:
        """Let the adapter ``name`` of ``leader`` count here too."""
        self._leader = [leader]
        self._names.append(name)

    def owner(self) -> TokenAdapter:
        return cast(TokenLayer, self.leader or self).token_adapter

    def rows(self, name: str) -> Tensor:
        return self.owner().trainable_tokens_delta[name]  # type: ignore[no-any-return]

    def index(self, name: str) -> TokenIndex:
        return cast(TokenIndex, self.owner().token_indices[name])

    def adapter_names(self) -> Collection[str]:
        return self._names

    def drop(self, name: str) -> None:
        self._names.remove(name)
        for held in (self.token_adapter.trainable_tokens_delta, self.token_adapter.token_indices):
            if name in held:
                del held[name]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        held = self.token_adapter.trainable_tokens_delta
        return {"token_adapter.trainable_tokens_delta": held[name]} if name in held else {}

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[0 if isinstance(self, nn.Embedding) else 1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[1 if isinstance(self, nn.Embedding) else 0])

    def clash(self, names: Collection[str]) -> str | None:
        mine = [index for name in names if name in self._names for index in self.index(name).indices]
        twice = sorted({index for index in mine if mine.count(index) > 1}) if len(names) > 1 else []
        text = f"more than one of {list(names)} has rows for the tokens {twice}"
        return f"Only one adapter can be set at a time for TrainableTokensWrapper: {text}" if twice else None

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        merged = self.weight.detach().clone()
        for name in names:
            merged[self.index(name).index] = cast_merged(self.rows(name).detach(), merged, [name])
        return {"weight": merged}

    @torch.no_grad()
    def store_merged(
        self,
        names: Collection[str],
        values: Mapping[str, Tensor],
        *,
        keep: bool,
        shared: Collection[int] = (),
    ) -> None:
        if values:
            index = torch.cat([self.index(name).index for name in names])
            if keep:  # the rows that change, not the whole weight
                self._originals = {"index": index, "rows": self.weight[index].clone()}
            self.weight[index] = values["weight"][index]
        super().store_merged(names, {}, keep=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._originals:
            self.weight[self._originals["index"]] = self._originals["rows"]
            self._originals = {}
        super().unmerge()

    def _originals_in_place(self) -> Tensor:
        """The weight as it is unmerged."""
        weight = self.weight.detach()
        if self._originals:
            weight = weight.clone()
            weight[self._originals["index"]] = self._originals["rows"]
        return weight


class TokenEmbedding(TokenLayer, nn.Embedding):
    """``nn.Embedding``, or a subclass that multiplies by its ``embed_scale``, with an adapter's rows in
    its output.  No copy of the weight is made."""

    plain_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        scale = getattr(self, "embed_scale", None)
        for name in self.applied:
            hits, rows = self.index(name).read(self.rows(name), input, self.weight.dtype)
            if scale is not None:
                rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
            out = torch.where(hits, rows.to(out), out)
        return out


class TokenLinear(TokenLayer, nn.Linear):  # type: ignore[override]
    """An output head (V, D) with an adapter's rows of its weight.

    Their columns of the output are worked out apart and written over the base's, so a column may differ
    in the last bits from what one product with a whole weight would give."""

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        for name in self.applied:
            index = self.index(name).index.to(out.device)
            bias = None if self.bias is None else self.bias[index]
            columns = F.linear(input, self.rows(name).to(self.weight), bias)
            # In place: backward through a linear layer needs its input and its weight, not its output.
            out = out.index_copy_(-1, index, columns.to(out.dtype))
        return out


def find_tokens(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """The indices of each layer that ``trainable_token_indices`` means, by its dotted name."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    paths = [path for path, _ in base_modules(model) if path]
    if isinstance(wanted, dict):
        return {path: indices for entry, indices in wanted.items() for path in paths if is_named(entry, path)}
    getter = getattr(model, "get_input_embeddings", None)
    inputs = getter() if getter is not None else None
    if inputs is None:
        return {path: wanted for path in paths if is_named(INPUT_NAME, path)}
    return {path: wanted for path, module in base_modules(model) if module is inputs and path}


def find_followers(model: nn.Module, found: dict[str, list[int]]) -> dict[str, str]:
    """The layers that share the weight of an embedding in ``found``, each with that embedding's name.

    A head that ``trainable_token_indices`` names with other indices than the embedding goes its own way,
    as in PEFT."""
    modules = dict(base_modules(model))
    shared = {id(modules[p].weight): p for p in reversed(found) if isinstance(modules[p], nn.Embedding)}
    followers = {}
    for path, module in modules.items():
        leader = shared.get(id(module._parameters.get("weight")), path)
        if leader != path and found.get(path, found[leader]) == found[leader]:
            followers[path] = leader
    return followers


def wrong_tokens(
    model: nn.Module, found: dict[str, list[int]], followers: dict[str, str], config: LoraConfig
) -> list[str]:
    """A problem for each entry that matches nothing, layer that cannot have rows of its own, and index
    outside the vocabulary."""
    wanted, problems = config.trainable_token_indices, []
    entries = list(wanted) if isinstance(wanted, dict) else []
    for entry in entries:
        if not any(is_named(entry, path) for path in found):
            problems.append(f"trainable_token_indices names {entry!r}, and no module is called that")
    if wanted is not None and not entries and not found:
        problems.append("trainable_token_indices: the model has no input embedding; give {name: indices}")
    for path in {**found, **followers}:
        module = model.get_submodule(path)
        if wrong := _wrong_layer(module):
            problems.append(f"trainable_token_indices: {path} {wrong}")
            continue
        rows = cast(Tensor, module.weight).shape[0]
        outside = [index for index in found.get(path, []) if index >= rows]
        if outside:
            problems.append(f"trainable_token_indices: {path} has {rows} rows, and there is no row {outside}")
        if isinstance(module, TokenLayer) and (module.leader is not None) != (path in followers):
            problems.append(f"trainable_token_indices: {path} is tied for one adapter and not for another")
    return problems


def _wrong_layer(module: nn.Module) -> str | None:
    kind = module.plain_class if isinstance(module, TokenLayer) else type(module)
    if isinstance(module, AdapterLayer) and not isinstance(module, TokenLayer):
        return "carries another kind of adapter already"
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Embedding, nn.Linear)) or weight is None or not weight.is_floating_point():
        return f"is a {kind.__name__}, not an embedding or a linear layer with floating-point weights"
    plain = kind.forward in (nn.Embedding.forward, nn.Linear.forward)
    scale: Any = getattr(module, "embed_scale", None)
    scaled = isinstance(module, nn.Embedding) and scale is not None
    if not plain and (not scaled or (isinstance(scale, Tensor) and scale.numel() != 1)):
        return f"is a {kind.__name__}, which computes something of its own in its forward"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "has max_norm or scale_grad_by_freq, which act on the whole weight"
    return None


def place_tokens(
    model: nn.Module, found: dict[str, list[int]], followers: dict[str, str], name: str, *, widen: bool
) -> None:
    """Give each layer its rows for the adapter ``name``, and each follower its leader."""
    for path, indices in found.items():
        if path not in followers:
            _adapted(model.get_submodule(path)).add_rows(name, list(indices), widen=widen)
    for path, leader in followers.items():
        _adapted(model.get_submodule(path)).follow(name, cast(TokenLayer, model.get_submodule(leader)))


def _adapted(module: nn.Module) -> TokenLayer:
    kind = TokenEmbedding if isinstance(module, nn.Embedding) else TokenLinear
    return cast(TokenLayer, adapt(module, kind))
