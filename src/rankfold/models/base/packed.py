"""A base model whose linear and embedding weights are held in few bytes, filled tensor by tensor.

The model is made without memory and never there as float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError, bullet_list
from rankfold.models.adapters.modalities import model_parts
from rankfold.models.base.content import Content, Contents
from rankfold.models.base.contents import contents_of
from rankfold.models.base.find import BaseSource
from rankfold.models.base.four_bit import four_bit_sizes, require_bitsandbytes, to_four_bits
from rankfold.models.base.processors import sees_images
from rankfold.models.choices import Stored
from rankfold.models.internvl.names import Layout
from rankfold.storage.forms import BF16, INT8, ROUNDED_Q4_0, Form, to_bf16, to_int8
from rankfold.storage.layers import can_hold, held_layers, hold

MATRIX = 2  # dimensions


@dataclass(frozen=True)
class Holding:
    """How weights are held: as ``stored`` where they can be (None: nowhere), else in ``dtype``; those of the
    modules in ``plain`` (by id) in ``dtype``, too, and the modules in ``heads`` take no 4 bits."""

    stored: Stored | None
    dtype: torch.dtype
    plain: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()


def held_model(
    config: Any,
    source: BaseSource,
    stored: Stored | None,
    dtype: torch.dtype = torch.float32,
    original: Layout | None = None,
) -> Any:
    """A model of ``config`` with the weights of ``source`` held as ``stored``; of one that sees images those
    of the language model only.  With None they are plain ones in ``dtype``.  ``original``: the files are
    those of InternVL's original layout.

    "gguf" keeps the blocks of a GGUF file as they are; "bfloat16", "int8" (a scale for each output) and
    "q4_0" (GGUF's blocks of 32, with embeddings and head as int8) round once; "nf4" makes bitsandbytes'
    linear layers, with embeddings and head as bfloat16.  Norms, biases and what cannot be held are in
    ``dtype``, and so is what an embedding gives.
    Raises ModelError listing what is missing or cannot be held."""
    from transformers import GenerationConfig

    if stored is not None and stored not in get_args(Stored):
        raise ModelError(f"stored={stored!r}: take one of {', '.join(get_args(Stored))}")
    if stored == "gguf" and source.gguf_file is None:
        raise ModelError(
            f"stored='gguf' keeps a GGUF file's own blocks, and {source.name} is no GGUF file; stored='q4_0' "
            "rounds to such blocks"
        )
    if stored == "nf4":
        require_bitsandbytes()
    model = _without_memory(config)
    model.tie_weights()  # which the block above took apart
    with contents_of(source, model, original) as contents:
        fill(model, contents, _holding(model, stored, dtype))
    if source.gguf_file is None:
        with suppress(OSError):  # a folder need not have one
            model.generation_config = GenerationConfig.from_pretrained(source.location)
    return model


def _without_memory(config: Any) -> Any:
    from accelerate.big_modeling import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config, dtype=torch.float32)


def _holding(model: Any, stored: Stored | None, dtype: torch.dtype) -> Holding:
    parts = model_parts(model)
    plain = (m for name, m in model.named_modules() if parts.part_of(name) in ("vision", "projector"))
    return Holding(stored, dtype, frozenset(map(id, plain)), frozenset({id(model.get_output_embeddings())}))


def describe(model: nn.Module) -> str:
    """How the weights of ``model`` are held, in words."""
    layers = {id(layer.held): layer for layer in held_layers(model).values()}.values()
    four_bit = four_bit_sizes(model)
    counts = Counter(layer.form.name for layer in layers) + Counter({"NF4": len(four_bit)})
    size = (sum(layer.held.numel() for layer in layers) + sum(four_bit)) / 1e6
    kinds = ", ".join(f"{count} as {name}" for name, count in counts.most_common())
    plain = [p for p in model.parameters() if p.dim() >= MATRIX and p.is_floating_point()]
    rest = sum(p.numel() * p.itemsize for p in plain) / 1e6
    also = f"; {len(plain)} more take {rest:,.0f} MB" if plain else ""
    return (
        f"{counts.total()} weights are held in {size:,.0f} MB ({kinds}) and expanded when they are used{also}"
    )


def fill(model: nn.Module, contents: Contents, holding: Holding) -> None:
    """Give every parameter of ``model``, made without memory, its content.

    Raises ModelError listing every parameter that has none or one of another shape."""
    problems = []
    for names, users in _parameters(model):
        name = next((name for name in names if name in contents), None)
        if name is None:
            problems.append(f"{names[0]} is missing")
            continue
        try:
            _place(users, contents[name](), holding)
        except ModelError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError(bullet_list(f"the weights do not fit a {type(model).__name__}:", problems))


def _parameters(model: nn.Module) -> list[tuple[list[str], list[tuple[nn.Module, str]]]]:
    """Each parameter by all of its names, with the modules that use it under a key."""
    found: dict[int, tuple[list[str], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            names, users = found.setdefault(id(parameter), ([], []))
            names.append(f"{path}.{key}" if path else key)
            users.append((module, key))
    return list(found.values())


def _place(users: list[tuple[nn.Module, str]], content: Content, holding: Holding) -> None:
    """Give all ``users`` of one parameter, each a module and a key, what it holds.  Raises ModelError."""
    wanted = users[0][0]._parameters[users[0][1]].shape  # type: ignore[union-attr]
    can_be_held = len(wanted) == MATRIX and all(
        key == "weight" and can_hold(module) and id(module) not in holding.plain for module, key in users
    )
    is_plain = not can_be_held or (holding.stored == "gguf" and content.kind is None)
    if holding.stored is None or is_plain:
        numbers = _numbers(content, wanted).to(holding.dtype, copy=True)
        parameter = nn.Parameter(numbers, requires_grad=holding.stored is None)
        for module, key in users:
            module._parameters[key] = parameter
        return
    few_bits = all(_takes_four_bits(module, holding) for module, _ in users)
    if holding.stored == "gguf":
        form, held = content.as_it_is()
    elif holding.stored == "nf4" and few_bits:
        for module, _ in users:
            to_four_bits(cast(nn.Linear, module), _numbers(content, wanted), holding.dtype)
        return
    else:
        form, rounded = ROUNDED[holding.stored] if few_bits else MORE_BITS[holding.stored]
        held = rounded(content.numbers())
    parameter = nn.Parameter(held, requires_grad=False)
    for module, _ in users:
        hold(module, form, parameter).numbers_like = torch.empty(0, dtype=holding.dtype)


def _numbers(content: Content, wanted: torch.Size) -> Tensor:
    numbers = content.numbers()
    if numbers.shape != wanted:
        raise ModelError(f"its shape is {tuple(numbers.shape)}, wanted {tuple(wanted)}")
    return numbers


def _takes_four_bits(module: nn.Module, holding: Holding) -> bool:
    return type(module) is nn.Linear and id(module) not in holding.heads


def _to_q4_0(weight: Tensor) -> Tensor:
    """``weight`` (rows, columns) as llama.cpp rounds it to Q4_0.  Raises ModelError if that cannot be."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    ROUNDED_Q4_0.block(weight.shape[1])
    if not torch.isfinite(weight).all():
        raise ModelError("a weight with NaN or infinite values cannot be held as Q4_0")
    return torch.from_numpy(quantize(weight.float().numpy(), GGMLQuantizationType.Q4_0))


ROUNDED: dict[str, tuple[Form, Callable[[Tensor], Tensor]]] = {
    "bfloat16": (BF16, to_bf16),
    "int8": (INT8, to_int8),
    "q4_0": (ROUNDED_Q4_0, _to_q4_0),
}
# Of embeddings and head, which lose more by 4 bits than all the others.
MORE_BITS = ROUNDED | {"q4_0": (INT8, to_int8), "nf4": (BF16, to_bf16)}
